//! Classifies failures of `PutEvents`, by the codes of entries and of whole requests. Every code has a class.

use std::borrow::Cow;
use std::error::Error;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_eventbridge::config::http::HttpResponse;
use aws_sdk_eventbridge::error::{ConnectorError, ProvideErrorMetadata, SdkError};
use aws_sdk_eventbridge::types::PutEventsResultEntry;

use crate::event::{Fault, Outcome, PublishError};
use crate::text::message_id;

/// Returns the outcome of one entry.
pub(super) fn of_entry(entry: PutEventsResultEntry) -> Outcome {
    match (entry.error_code, entry.event_id) {
        (Some(code), _) => {
            let message = entry.error_message.unwrap_or_default();
            Outcome::Failed(PublishError::new(classify_entry(&code), code, without_values(&message)))
        }
        (None, Some(event_id)) => Outcome::Delivered { message_id: Some(message_id(event_id)) },
        (None, None) => {
            let message = "the entry's answer has neither an EventId nor an ErrorCode";
            Outcome::Failed(PublishError::new(Fault::Unknown, "empty_answer", message))
        }
    }
}

/// Classifies the `ErrorCode` of an entry.
fn classify_entry(code: &str) -> Fault {
    match code {
        "InvalidArgument" | "MalformedDetail" | "RedactionFailure" => Fault::Event,
        "AccessDeniedException"
        | "NotAuthorizedForSourceException"
        | "NotAuthorizedForDetailTypeException"
        | "InvalidAccountIdException"
        | "ResourceNotFoundException" => Fault::Misconfigured,
        // Throttling*, Internal*, ServiceUnavailable, and all codes that are not known here.
        _ => Fault::Destination,
    }
}

/// Classifies the refusal of a whole request. [`Fault::Event`] means that the content of the request was refused.
fn classify_refusal(status: u16, code: &str, message: &str) -> Fault {
    const MISCONFIGURED: [&str; 13] = [
        "AccessDenied",
        "ExpiredToken",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignature",
        "MissingAuthenticationToken",
        "NotAuthorized",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "ResourceNotFound",
        "SignatureDoesNotMatch",
        "UnknownOperation", // the endpoint is not EventBridge
        "UnrecognizedClient",
    ];
    match status {
        200..=299 => Fault::Unknown, // a success that the SDK could not read
        500.. | 429 => Fault::Destination,
        _ if MISCONFIGURED.iter().any(|prefix| code.starts_with(prefix)) => Fault::Misconfigured,
        _ if code == "ValidationException" && message.contains("eventBusName") => Fault::Misconfigured,
        413 => Fault::Event,
        _ if matches!(code, "ValidationException" | "SerializationException") => Fault::Event,
        _ => Fault::Destination,
    }
}

/// Whether AWS refused the request regardless of its events: because of the credentials, the signature, the clock, or because
/// the endpoint is not EventBridge.
fn concerns_no_event(code: &str) -> bool {
    const REFUSED: [&str; 10] = [
        "ExpiredToken",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignature",
        "MissingAuthenticationToken",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "UnknownOperation",
        "UnrecognizedClient",
    ];
    REFUSED.iter().any(|prefix| code.starts_with(prefix))
}

/// Returns the error of a request that has no answers for its entries.
pub(super) fn of_request<E: ProvideErrorMetadata + Error + 'static>(error: SdkError<E, HttpResponse>) -> PublishError {
    match &error {
        SdkError::ServiceError(refusal) => {
            let status = refusal.raw().status().as_u16();
            let message = without_values(refusal.err().message().unwrap_or_default());
            let code = refusal.err().code().unwrap_or_default();
            let fault = classify_refusal(status, code, &message);
            match (fault, code) {
                // The SDK's message would quote the body.
                (Fault::Unknown, _) => unreadable_answer(),
                (_, "") => PublishError::new(fault, format!("http_{status}"), message),
                _ => {
                    PublishError { of_destination: concerns_no_event(code), ..PublishError::new(fault, code, message) }
                }
            }
        }
        SdkError::ResponseError(_) => unreadable_answer(),
        SdkError::TimeoutError(_) => PublishError::new(Fault::Unknown, "timeout", "no answer in time"),
        SdkError::ConstructionFailure(_) => not_sent(),
        SdkError::DispatchFailure(failure) => of_dispatch(failure.as_connector_error()),
        _ => PublishError::new(Fault::Unknown, "unknown", "an error that this version of the relay does not know"),
    }
}

/// Returns the error of a request without an answer. The SDK does not say whether the request was sent. The cause in its error
/// does: it is an error of the HTTP client, or of something before it.
fn of_dispatch(error: Option<&ConnectorError>) -> PublishError {
    let cause = error.and_then(Error::source);
    let client = cause.and_then(|cause| cause.downcast_ref::<hyper_util::client::legacy::Error>());
    let credentials = cause.and_then(|cause| cause.downcast_ref::<CredentialsError>());
    match (error, client, credentials) {
        // Without a connection nothing was sent: a refusal, DNS, TLS, or the connect timeout.
        (_, Some(client), _) if client.is_connect() => {
            PublishError::new(Fault::Destination, "connection_failed", chain(client)).of_destination()
        }
        (_, _, Some(credentials)) => no_credentials(credentials),
        (Some(error), None, None) if error.is_user() || error.is_other() => not_sent(),
        _ => PublishError::new(Fault::Unknown, "connection_lost", cause.map(chain).unwrap_or_default()),
    }
}

/// Returns the error for missing credentials. The SDK's own message lists every place that it tried, in technical terms.
fn no_credentials(error: &CredentialsError) -> PublishError {
    let message = match error {
        CredentialsError::CredentialsNotLoaded(_) => {
            "there are no AWS credentials: neither in variables, nor in a profile, nor from a role of the host. Set \
             AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the host a role."
                .to_owned()
        }
        _ => {
            let root = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source()).last();
            format!("the AWS credentials could not be loaded: {}", root.map(ToString::to_string).unwrap_or_default())
        }
    };
    PublishError::new(Fault::Misconfigured, "no_credentials", message).of_destination()
}

/// Returns the error for a request that the SDK did not hand to the HTTP client. The SDK's own message is not used: for a bad
/// endpoint it quotes the request.
fn not_sent() -> PublishError {
    let message = "the request could not be made: no credentials, no region, or an endpoint that is no URL";
    PublishError::new(Fault::Misconfigured, "not_sent", message)
}

fn unreadable_answer() -> PublishError {
    PublishError::new(Fault::Unknown, "unreadable_answer", "the answer to the request cannot be read")
}

/// Returns the messages of an error and its causes.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Returns AWS's message without the values that it quotes, which can be whole entries: `Value '...' at 'entries' failed to
/// satisfy`.
fn without_values(message: &str) -> Cow<'_, str> {
    let Some(start) = message.find("Value '") else {
        return Cow::Borrowed(message);
    };
    let rest = message.rfind("' at '").map_or("", |end| &message[end + 1..]);
    Cow::Owned(format!("{}Value{rest}", &message[..start]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_code_has_its_fault() {
        let table: [(Fault, &[&str]); 3] = [
            (Fault::Event, &["InvalidArgument", "MalformedDetail", "RedactionFailure"]),
            (
                Fault::Misconfigured,
                &[
                    "AccessDeniedException",
                    "InvalidAccountIdException",
                    "NotAuthorizedForDetailTypeException",
                    "NotAuthorizedForSourceException",
                    "ResourceNotFoundException",
                ],
            ),
            (
                Fault::Destination,
                &[
                    "",
                    "InternalException",
                    "InternalFailure",
                    "InternalServiceError",
                    "ServiceUnavailable",
                    "SomethingNew",
                    "Throttling",
                    "ThrottlingException",
                ],
            ),
        ];
        for (fault, codes) in table {
            for code in codes {
                assert_eq!(classify_entry(code), fault, "{code}");
            }
        }
    }

    #[test]
    fn every_refusal_of_a_request_has_its_fault() {
        let table: [(Fault, u16, &[&str]); 8] = [
            (Fault::Unknown, 200, &["", "InternalException"]),
            (Fault::Destination, 400, &["", "SomethingNew", "Throttling", "ThrottlingException"]),
            (Fault::Destination, 403, &[""]),
            (Fault::Destination, 429, &["", "AccessDeniedException"]),
            (Fault::Destination, 500, &["", "InternalException", "InternalFailure"]),
            (Fault::Destination, 503, &["", "ServiceUnavailable", "ValidationException"]),
            (
                Fault::Misconfigured,
                400,
                &[
                    "AccessDeniedException",
                    "ExpiredTokenException",
                    "IncompleteSignature",
                    "InvalidClientTokenId",
                    "InvalidSignatureException",
                    "MissingAuthenticationToken",
                    "MissingAuthenticationTokenException",
                    "NotAuthorized",
                    "RequestExpired",
                    "RequestTimeTooSkewed",
                    "ResourceNotFoundException",
                    "SignatureDoesNotMatch",
                    "UnknownOperationException",
                    "UnrecognizedClientException",
                ],
            ),
            (Fault::Event, 413, &["", "RequestEntityTooLargeException"]),
        ];
        for (fault, status, codes) in table {
            for code in codes {
                assert_eq!(classify_refusal(status, code, ""), fault, "{status} {code}");
            }
        }
    }

    #[test]
    fn who_asks_is_refused_by_other_codes_than_what_is_asked() {
        assert!(["ExpiredTokenException", "UnrecognizedClientException"].into_iter().all(concerns_no_event));
        assert!(!["AccessDeniedException", "ResourceNotFoundException", ""].into_iter().any(concerns_no_event));
    }

    #[test]
    fn a_request_invalid_for_its_content_is_the_events_fault_and_for_its_bus_the_configurations() {
        let judge = |message| classify_refusal(400, "ValidationException", message);
        assert_eq!(judge("Total size of the entries in the request is over the limit."), Fault::Event);
        assert_eq!(judge("Value at 'entries.1.member.eventBusName' failed to satisfy ..."), Fault::Misconfigured);
        assert_eq!(classify_refusal(400, "SerializationException", ""), Fault::Event);
    }

    #[test]
    fn the_values_that_aws_quotes_are_cut_from_its_message() {
        let message = "1 validation error detected: Value '[Entry(detail={\"a\":\"' at '4711\"})]' at 'entries' failed";
        assert_eq!(without_values(message), "1 validation error detected: Value at 'entries' failed");
        assert_eq!(without_values("Value '4711"), "Value");
        assert_eq!(without_values("Rate exceeded"), "Rate exceeded");
    }
}

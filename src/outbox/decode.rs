//! Decides whether a row that was read can be published. The rules are the same for every store.

use std::collections::BTreeMap;

use crate::event::{Fault, HeaderName, MAX_HEADERS_BYTES, MAX_TEXT_BYTES, PublishError};

/// Returns the defect of a payload of `size` bytes if it is larger than `max_payload`.
pub(super) fn too_large(size: usize, max_payload: usize) -> Option<PublishError> {
    (size > max_payload).then(|| over("payload", size, max_payload))
}

/// The defect of a column whose `size` in bytes is too large.
pub(super) fn over(column: &str, size: usize, max_payload: usize) -> PublishError {
    let message = match column {
        // The size is measured in the table, so it is close to the length of the text.
        "payload" => format!("the payload has {size} bytes, EVENT_MAX_PAYLOAD_SIZE allows {max_payload}"),
        "headers" => format!("the headers have {size} bytes, and at most {MAX_HEADERS_BYTES} are allowed"),
        _ => format!("{column} has {size} bytes, and at most {MAX_TEXT_BYTES} are allowed"),
    };
    PublishError::new(Fault::Unfit, format!("{column}_too_large"), message)
}

/// The defect of a column that is NULL, which is possible if somebody has dropped its constraint.
pub(super) fn missing(column: &str) -> PublishError {
    PublishError::new(Fault::Unfit, format!("{column}_missing"), format!("the column {column} of the event is NULL"))
}

/// Returns the headers of an event from the JSON of the column. NULL means no headers.
///
/// # Errors
/// The defect of the event.
pub(super) fn headers(json: Option<&[u8]>) -> Result<Vec<(String, String)>, PublishError> {
    match json.map(serde_json::from_slice::<BTreeMap<String, String>>) {
        None => Ok(Vec::new()),
        // A row may be older than the present rule for names.
        Some(Ok(headers)) => match headers.keys().find_map(|name| HeaderName::trouble(name)) {
            None => Ok(headers.into_iter().collect()),
            Some(HeaderName::Empty) => {
                Err(PublishError::new(Fault::Unfit, "header_name_empty", "a header of the event has no name"))
            }
            Some(HeaderName::Reserved) => {
                let message = "a header of the event has the name of an attribute of events";
                Err(PublishError::new(Fault::Unfit, "header_name_reserved", message))
            }
        },
        Some(Err(error)) => {
            let message = format!("the headers are not a flat map of strings ({:?} error)", error.classify());
            Err(PublishError::new(Fault::Unfit, "headers_invalid", message))
        }
    }
}

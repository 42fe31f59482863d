//! URLs with secrets: what is shown of one never contains the secret, even if the text is not a valid URL.
#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use outbox_relay::redact::hide;
use outbox_relay::outbox::database::Database;
use outbox_relay::secret::Secret;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis::fuzzing::shown;

/// A word that occurs nowhere else.
const CANARY: &str = "Hunter2Canary";

const SCHEMES: [&str; 12] = [
    "postgres://",
    "postgresql://",
    "redis://",
    "rediss://",
    "redis+unix://",
    "redis-cluster://",
    "rediss-cluster://",
    "redis-sentinel://",
    "rediss-sentinel://",
    "sqlite:",
    "sqlite://",
    "",
];

fn text(bytes: &mut Unstructured<'_>) -> Result<String> {
    Ok(bytes.arbitrary::<&str>()?.chars().take(24).collect())
}

/// The text, percent-encoded.
fn encoded(text: &str) -> String {
    let one =
        |byte: u8| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(one).collect()
}

fuzz_target!(|data: &[u8]| {
    run(&mut Unstructured::new(data)).ok();
});

fn run(bytes: &mut Unstructured<'_>) -> Result<()> {
    let scheme = if bytes.ratio(1, 8)? { text(bytes)? } else { (*bytes.choose(&SCHEMES)?).to_owned() };
    let mut password = format!("{}{CANARY}{}", text(bytes)?, text(bytes)?);
    if bytes.arbitrary()? {
        password = encoded(&password);
    }
    // The secret may also be in the place of the user, where a token is easily put. The name of a user with a password is shown.
    let name = if bytes.ratio(1, 4)? { None } else { Some(text(bytes)?) };
    let user = name.as_ref().map_or_else(|| encoded(&password), |name| format!("{}:{password}", encoded(name)));
    let rest = text(bytes)?;
    // The fuzzer learns the word from the comparison below, and may put it where it is not a secret.
    if format!("{scheme} {} {rest}", name.unwrap_or_default()).to_lowercase().contains(&CANARY.to_lowercase()) {
        return Ok(());
    }
    let url = format!("{scheme}{user}@{rest}");

    let secret = Secret::inline(&url);
    let (redis, database) = (RedisAddress::Url(secret.clone()), Database::new(secret.clone(), false));
    let mut displayed = vec![
        ("hide", hide(&url)),
        ("Secret", format!("{secret:?}")),
        ("RedisAddress", format!("{redis:?}")),
        ("redis", shown(&redis).unwrap_or_else(|error| format!("{error} {error:?}"))),
        ("validate", redis.validate().err().map(|error| error.to_string()).unwrap_or_default()),
    ];
    displayed.push(match database {
        Ok(database) => ("Database", format!("{database:?}")),
        Err(error) => ("database", format!("{} {error} {error:?}", error.explain())),
    });
    for (place, text) in displayed {
        let lower = text.to_lowercase();
        // The path of a file is not a secret, although a user may have written `sqlite:` as a URL with a password.
        if !(url.starts_with("sqlite:") && place.to_lowercase() == "database") {
            assert!(!lower.contains(&CANARY.to_lowercase()), "{place} of {url:?} shows {text:?}");
        }
    }
    Ok(())
}

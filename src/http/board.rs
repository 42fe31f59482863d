//! The page for people at `/`, and what it shows.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::outbox::OutboxError;
use crate::outbox::mend::{DeadLetter, Filter};
use crate::outbox::operate::Operate;
use crate::outbox::status::StatusRequest;

/// The page: one file that loads nothing from elsewhere. `{nonce}` stands where its script and its style need the nonce.
const HTML: &str = include_str!("page.html");

/// How long an answer of the database is shown to everybody who asks. So the number of open pages costs the database nothing.
const FRESH: Duration = Duration::from_secs(2);

/// After this time a database that does not answer is shown as such.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How many of the newest dead letters are shown.
const DEAD_LETTERS: i64 = 10;

/// What waits in the database, for the page.
pub(crate) struct Board {
    operate: Box<dyn Operate>,
    last: Mutex<Option<(Instant, Value)>>,
}

impl Board {
    /// `operate` opens a connection each time that the database is asked, and only while somebody looks at the page.
    pub(crate) fn new(operate: Box<dyn Operate>) -> Self {
        Self { operate, last: Mutex::default() }
    }

    /// Returns `status`, as `relay status --json --keys` prints it, and the newest `dead_letters`. What could not be read is
    /// null, and `error` or `dead_letters_error` says why.
    pub(crate) async fn read(&self) -> Value {
        let mut last = self.last.lock().await;
        if let Some((_, value)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return value.clone();
        }
        let asked = async {
            let status = self.operate.status(StatusRequest { keys: true }).await?;
            Ok::<_, OutboxError>((status, self.dead_letters().await))
        };
        let value = match tokio::time::timeout(TIMEOUT, asked).await {
            Ok(Ok((status, dead_letters))) => json!({
                "status": status,
                "dead_letters": dead_letters.as_ref().ok(),
                // A relay needs no right to read them.
                "dead_letters_error": dead_letters.as_ref().err().map(OutboxError::explain),
                "error": null,
            }),
            Ok(Err(error)) => json!({ "status": null, "dead_letters": null, "error": error.explain() }),
            Err(_) => {
                let error = format!("no answer from the database within {} s", TIMEOUT.as_secs());
                json!({ "status": null, "dead_letters": null, "error": error })
            }
        };
        *last = Some((Instant::now(), value.clone()));
        value
    }

    async fn dead_letters(&self) -> Result<Vec<DeadLetter>, OutboxError> {
        self.operate.mend().await?.dead_letters(&Filter::default(), DEAD_LETTERS).await
    }
}

/// Returns the page, and the policy that lets a browser run this page's own script and nothing else.
pub(crate) fn html() -> (String, String) {
    let nonce = Uuid::new_v4().simple().to_string();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    );
    (HTML.replace("{nonce}", &nonce), policy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_loads_nothing_and_its_script_has_the_nonce_of_its_policy() {
        let (page, policy) = html();
        let nonce =
            policy.split("script-src 'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
        assert_eq!(page.matches(&format!("nonce=\"{nonce}\"")).count(), 2, "the script and the style");
        assert!(!page.contains("{nonce}") && html().1 != policy, "each answer has a nonce of its own");
        for foreign in ["http://", "https://", "src=", "@import", "innerHTML", "style=\"", "onclick"] {
            let rest = page.replace("http://www.w3.org/2000/svg", "");
            assert!(!rest.contains(foreign), "{foreign}");
        }
    }
}

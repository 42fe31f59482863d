//! The page for people at `/`, and what it shows.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::outbox::operate::Operate;
use crate::outbox::status::StatusRequest;

/// The page: one file that loads nothing from elsewhere. `{nonce}` stands where its script and its style need the nonce.
const HTML: &str = include_str!("page.html");

/// How long an answer of the database is shown to everybody who asks. So the number of open pages costs the database nothing.
const FRESH: Duration = Duration::from_secs(2);

/// After this time a database that does not answer is shown as such.
const TIMEOUT: Duration = Duration::from_secs(5);

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

    /// Returns `status`, as `relay status --json --keys` prints it, and `error`; one of the two is null.
    pub(crate) async fn read(&self) -> Value {
        let mut last = self.last.lock().await;
        if let Some((_, value)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return value.clone();
        }
        let (status, error) =
            match tokio::time::timeout(TIMEOUT, self.operate.status(StatusRequest { keys: true })).await {
                Ok(Ok(status)) => (json!(status), None),
                Ok(Err(error)) => (Value::Null, Some(error.explain())),
                Err(_) => (Value::Null, Some(format!("no answer from the database within {} s", TIMEOUT.as_secs()))),
            };
        let value = json!({ "status": status, "error": error });
        *last = Some((Instant::now(), value.clone()));
        value
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

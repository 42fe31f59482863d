//! The sources of settings, and their precedence.

use serde_json::Value;

use super::{NOWHERE, STDOUT, file};
use crate::binary::{Running, finished, relay};
use crate::servers::{Server, database, redis};

/// Returns what `relay check --json` shows of a setting, as `value (from)`.
fn in_force(args: &[&str], variables: &[(&str, &str)]) -> impl Fn(&str) -> String + use<> {
    let args = [&["check", "--json"], args].concat();
    let shown: Value = serde_json::from_str(&finished(&args, variables).exited(0).stdout).unwrap();
    move |variable| {
        let setting = &shown["settings"][variable];
        if setting.is_null() {
            return "not set".to_owned();
        }
        format!("{} ({})", setting["value"].as_str().unwrap(), setting["from"].as_str().unwrap())
    }
}

#[tokio::test]
async fn options_win_over_variables_and_variables_over_the_file() {
    let database = database().await;
    let file = file("lanes = 1\nbatch_size = 11\nretry_jitter = false\nlog_retention = \"2d\"\nstdout = true");
    let variables = [
        ("DATABASE_URL", database.url()),
        ("RELAY_CONFIG", file.path().to_str().unwrap()),
        ("EVENT_OUTBOX_BATCH_SIZE", "22"),
        ("RELAY_LANES", "2"),
    ];
    let shown = in_force(&["--lanes", "3"], &variables);
    assert_eq!(shown("RELAY_LANES"), "3 (option)");
    assert_eq!(shown("EVENT_OUTBOX_BATCH_SIZE"), "22 (environment)");
    assert_eq!(shown("EVENT_BACKOFF_JITTER"), "false (file)");
    assert_eq!(shown("RELAY_LOG_RETENTION"), "2d (file)");
    assert_eq!(shown("EVENT_DEFAULT_MAX_RETRIES"), "3 (default)");
    assert_eq!(shown("REDIS_URL"), "not set");
    // Options may also stand before the command.
    let text = finished(&["--lanes=3", "check"], &variables).exited(0).stdout;
    let shown: Vec<&str> = text.lines().filter(|line| line.starts_with("RELAY_LANES ")).collect();
    assert!(shown.len() == 1 && shown[0].ends_with("  3  (option)"), "{shown:?}");
}

#[tokio::test]
async fn empty_variables_count_as_not_set() {
    let database = database().await;
    let help = finished(&["run", "--help"], &[]).exited(0).stdout;
    let all = help.split("[env: ").skip(1).map(|rest| rest.split(['=', ']']).next().unwrap());
    let mut variables: Vec<(&str, &str)> = all.map(|variable| (variable, "")).collect();
    assert!(variables.len() > 35);
    variables.push(("CREDENTIALS_DIRECTORY", ""));
    variables.extend([("DATABASE_URL", database.url()), STDOUT]); // the later of two values counts
    let shown = in_force(&[], &variables);
    assert_eq!(shown("EVENT_OUTBOX_BATCH_SIZE"), "1000 (default)");
    assert_eq!(shown("RELAY_STDOUT"), "true (environment)");
    assert_eq!(shown("REDIS_HOST"), "not set");
    finished(&["--once"], &[("DATABASE_URL", ""), STDOUT]).exited(2).says(&["DATABASE_URL is not set"]);

    // An empty CREDENTIALS_DIRECTORY does not mean the working directory.
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("database_url"), NOWHERE.1).unwrap();
    let mut command = relay(&["--once"], &[("CREDENTIALS_DIRECTORY", ""), STDOUT]);
    command.current_dir(directory.path());
    Running::start(command).finish().exited(2).says(&["DATABASE_URL is not set"]);
}

#[tokio::test]
async fn secrets_come_from_files_and_from_systemd_credentials() {
    let database = database().await;
    let directory = tempfile::tempdir().unwrap();
    for (name, secret) in [("database_url", database.url()), ("redis_url", redis().url())] {
        std::fs::write(directory.path().join(name), format!("{secret}\n")).unwrap();
    }
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (database_file, redis_file) = (path("database_url"), path("redis_url"));
    let files = [("DATABASE_URL_FILE", database_file.as_str()), ("REDIS_URL_FILE", redis_file.as_str())];
    let credentials = [("CREDENTIALS_DIRECTORY", directory.path().to_str().unwrap())];
    for variables in [&files[..], &credentials[..]] {
        let check = finished(&["check"], variables).exited(0).stdout;
        assert!(check.contains("\nok    privileges") && check.contains("\nok    destination redis: "), "{check}");
    }
    // A variable overrides a credential.
    finished(&["--once"], &[credentials[0], NOWHERE]).exited(1).says(&["cannot connect"]);

    let server = Server::start("redis", &["--set", "requirepass=known"]);
    let port = server.port().to_string();
    let parts = [("DATABASE_URL", database.url()), ("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", port.as_str())];
    let password = file("known\n");
    let in_file = ("REDIS_PASSWORD_FILE", password.path().to_str().unwrap());
    finished(&["check"], &[&parts[..], &[in_file]].concat()).exited(0);
    finished(&["check"], &[&parts[..], &[("REDIS_PASSWORD", "known")]].concat()).exited(0);
    std::fs::write(directory.path().join("redis_password"), "known").unwrap();
    std::fs::remove_file(directory.path().join("redis_url")).unwrap();
    finished(&["check"], &[&parts[..], &credentials].concat()).exited(0);
    let without = finished(&["check"], &parts).exited(1).stdout;
    assert!(without.contains("FAIL  destination redis: NOAUTH"), "{without}");
}

#[tokio::test]
async fn service_links_of_kubernetes_are_no_settings() {
    let database = database().await;
    // The variables that Kubernetes sets for Services named relay and relay-http.
    let variables = [
        ("DATABASE_URL", database.url()),
        STDOUT,
        ("RELAY_SERVICE_HOST", "10.0.0.7"),
        ("RELAY_SERVICE_PORT", "9464"),
        ("RELAY_SERVICE_PORT_METRICS", "9464"),
        ("RELAY_PORT", "tcp://10.0.0.7:9464"),
        ("RELAY_PORT_9464_TCP", "tcp://10.0.0.7:9464"),
        ("RELAY_PORT_9464_TCP_PROTO", "tcp"),
        ("RELAY_PORT_9464_TCP_PORT", "9464"),
        ("RELAY_PORT_9464_TCP_ADDR", "10.0.0.7"),
        ("RELAY_HTTP_SERVICE_HOST", "10.0.0.8"),
        ("RELAY_HTTP_PORT", "udp://10.0.0.8:53"),
        ("RELAY_HTTP_PORT_53_UDP_ADDR", "10.0.0.8"),
    ];
    finished(&["--once"], &variables).exited(0);
}

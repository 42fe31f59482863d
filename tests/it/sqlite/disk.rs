//! A full disk, and one that cannot be written.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::binary::Running;
use crate::harness::{column, count, emit, eventually};
use crate::stores::{Sqlite, SqliteRollbackJournal, Store};

/// The relay, started by `wrapper`, a command line to which the program's path is appended.
fn relay_by(wrapper: &[&str], args: &[&str], url: &str) -> Command {
    let mut command = Command::new(wrapper[0]);
    command.args(&wrapper[1..]).arg(env!("CARGO_BIN_EXE_relay")).args(args);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.envs([("DATABASE_URL", url), ("RELAY_STDOUT", "true"), ("RELAY_LOG_FORMAT", "text")]);
    command
}

/// Sets the largest size of the files that `process` writes.
fn limit_files(process: u32, limit: &str) {
    let status = Command::new("prlimit").arg(format!("--pid={process}")).arg(format!("--fsize={limit}:")).status();
    assert!(status.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_no_more_costs_time_and_repeats_nothing() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let mut relay = Running::start(relay_by(&["env"], &["run"], store.url()));
    emit(&mut connection, "e0", "k").await;
    eventually("the first is recorded", async || count(&mut connection, "event_outbox").await == 0).await;
    // A write beyond the limit fails, as on a full disk.
    limit_files(relay.id(), "4096");
    for index in 1..5 {
        emit(&mut connection, &format!("e{index}"), "k").await;
    }
    relay.until_log("cannot settle");
    assert_eq!(count(&mut connection, "event_processing_log").await, 1);
    limit_files(relay.id(), "unlimited");
    eventually("everything is recorded", async || count(&mut connection, "event_outbox").await == 0).await;
    let published: Vec<String> = relay
        .output()
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(published, ["e0", "e1", "e2", "e3", "e4"]);
    assert_eq!(
        column(&mut connection, "select event_type from event_processing_log order by outbox_id").await,
        published
    );
    relay.signal("TERM");
    relay.finish().exited(0);
}

async fn nothing_is_published_that_could_not_be_recorded<S: Store>() {
    let store = S::new().await;
    emit(&mut store.connect().await, "e", "").await;
    let file = Path::new(store.url().strip_prefix("sqlite:").unwrap()).to_owned();
    let folder = file.parent().unwrap().to_owned();
    // Root may write everywhere unless it gives up its capabilities.
    let powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    let wrapper = if std::fs::metadata("/proc/self").unwrap().uid() == 0 { &powerless[..] } else { &["env"] };
    for read_only in [&file, &folder] {
        let before = std::fs::metadata(read_only).unwrap().permissions();
        std::fs::set_permissions(read_only, Permissions::from_mode(before.mode() & 0o555)).unwrap();
        let once = Running::start(relay_by(wrapper, &["--once"], store.url())).finish();
        let check = Running::start(relay_by(wrapper, &["check"], store.url())).finish();
        std::fs::set_permissions(read_only, before).unwrap();
        let once =
            once.exited(1).says(&["attempt to write a readonly database; the file, its folder or its file system"]);
        assert_eq!(once.stdout, "", "{}", read_only.display());
        assert!(check.exited(1).stdout.contains("FAIL"));
    }
    let once = Running::start(relay_by(&["env"], &["--once"], store.url())).finish().exited(0);
    assert_eq!(once.stdout.lines().count(), 1);
}

#[tokio::test]
async fn a_file_or_folder_that_is_read_only_is_told_before_anything_is_published() {
    nothing_is_published_that_could_not_be_recorded::<Sqlite>().await;
    nothing_is_published_that_could_not_be_recorded::<SqliteRollbackJournal>().await;
}

//! A database that cannot be used.

use outbox_relay::outbox::postgres::migrate::SCHEMA_VERSION;

use super::{NOWHERE, STDOUT, url_for};
use crate::binary::{cannot_work, finished};
use crate::harness::sql;
use crate::servers::{database, empty_database, redis};

#[tokio::test]
async fn a_wrong_password_is_told() {
    let url = url_for(&database().await, "postgres", "wrong");
    cannot_work(&url, &["cannot connect to the database: password authentication failed", "check user and password"]);
}

#[tokio::test]
async fn a_database_that_is_not_there_is_told() {
    let database = database().await;
    let (server, _) = database.url().rsplit_once('/').unwrap();
    cannot_work(&format!("{server}/nowhere"), &["database \"nowhere\" does not exist", "correct its name"]);
}

#[test]
fn a_host_that_is_not_reached_is_told_once() {
    let once = finished(&["--once"], &[NOWHERE, STDOUT, ("RELAY_LOG", "error")]).exited(1);
    assert_eq!(once.complaint().matches("Connection refused").count(), 1, "{}", once.stderr);
    cannot_work(NOWHERE.1, &["cannot connect to the database", "Connection refused", "is the server up"]);
    cannot_work("postgres://nobody@nowhere.invalid/none", &["cannot connect to the database", "is the server up"]);
}

#[test]
fn a_server_that_does_not_speak_postgres_is_told() {
    let url = redis().url().replace("redis://", "postgres://nobody@");
    cannot_work(&url, &["cannot connect to the database"]);
}

#[tokio::test]
async fn missing_tables_are_told() {
    let database = empty_database().await;
    let needed = format!("schema version 0, this relay needs {SCHEMA_VERSION}: run `relay migrate`");
    cannot_work(database.url(), &[&needed]);
}

#[tokio::test]
async fn missing_privileges_are_told() {
    let database = database().await;
    let (_, name) = database.url().rsplit_once('/').unwrap();
    let role = format!("{name}_nobody");
    sql(&mut database.connect().await, format!("create role {role} login password 'known'")).await;
    cannot_work(&url_for(&database, &role, "known"), &["deploy/sql/roles.sql has all the relay needs"]);
}

#[tokio::test]
async fn f19_a_read_only_database_is_told() {
    let database = database().await;
    let (_, name) = database.url().rsplit_once('/').unwrap();
    sql(&mut database.connect().await, format!("alter database {name} set default_transaction_read_only = on")).await;
    cannot_work(database.url(), &["the database is read-only", "point DATABASE_URL at the primary"]);
    let emitted = finished(&["emit", "a"], &[("DATABASE_URL", database.url())]).exited(1);
    assert!(emitted.complaint().contains("read-only"), "{}", emitted.stderr);
}

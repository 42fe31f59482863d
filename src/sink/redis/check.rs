//! The tests that `relay check` makes at a Redis. Nothing is published.

use redis::{FromRedisValue, Value};

use crate::event::{Fault, PublishError};
use crate::sink::redis::connection::slot_of;
use crate::sink::redis::fault::call_error;
use crate::sink::redis::state_key::state_key;
use crate::sink::redis::{Redis, script};

impl Redis {
    /// Connects, and runs the script with no event. Returns the address, without secrets.
    pub(in crate::sink) async fn check(&self) -> Result<String, PublishError> {
        let (number, mut connection) = self.connection().await?;
        if let Err(error) = connection.call(&script::publish_nothing(), 0).await {
            self.give_up(number).await;
            return Err(call_error(error));
        }
        let target = self.address.target()?;
        let eviction = self.eviction().await.map(|policy| format!(", {policy}")).unwrap_or_default();
        Ok(format!("{target}, {}{eviction}", target.encryption()))
    }

    /// Returns a warning if Redis may evict the stream. `None` also if the user may not ask for the policy.
    async fn eviction(&self) -> Option<String> {
        let (_, mut connection) = self.connection().await.ok()?;
        let info: String =
            redis::from_redis_value(connection.call(redis::cmd("INFO").arg("memory"), 0).await.ok()?).ok()?;
        let policy = info.lines().find_map(|line| line.strip_prefix("maxmemory_policy:"))?.trim();
        policy.starts_with("allkeys-").then(|| {
            format!(
                "warning: with maxmemory-policy {policy} Redis may evict the stream itself, read or not; set noeviction"
            )
        })
    }

    /// Tries commands that change nothing, to find out whether the user may run them on this key.
    pub(in crate::sink) async fn probe(&self, key: &str, commands: &[&[&str]]) -> Result<(), PublishError> {
        let (_, mut connection) = self.connection().await?;
        for (name, rest) in commands.iter().filter_map(|command| command.split_first()) {
            let mut command = redis::cmd(name);
            command.arg(key).arg(rest);
            if let Err(error) = connection.call(&command, slot_of(key.as_bytes())).await {
                let error = call_error(error);
                // "ERR" is about the arguments of the command, which are wrong on purpose.
                if error.code != "ERR" || error.fault != Fault::Destination {
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Tries the commands that the scripts run on the states beside a stream.
    pub(in crate::sink) async fn probe_states(&self, stream: &str) -> Result<(), PublishError> {
        let commands: [&[&str]; 8] = [
            &["HMGET", "owner", "0"],
            &["HGET", "owner"],
            &["HLEN"],
            &["HGETALL"],
            &["HSET", "a", "b", "c"],
            &["DEL"],
            &["PERSIST"],
            &["EXPIRE", "x"],
        ];
        self.probe(&state_key(Some(stream), "check"), &commands).await
    }

    /// Whether the user may publish to this channel, if Redis says so. A message cannot be tried: it would reach subscribers.
    pub(in crate::sink) async fn may_publish(&self, channel: &str) -> Result<(), PublishError> {
        let (_, mut connection) = self.connection().await?;
        let Ok(user) = connection.call(redis::cmd("ACL").arg("WHOAMI"), 0).await else { return Ok(()) };
        let Ok(user) = redis::from_redis_value::<String>(user) else { return Ok(()) };
        let mut dry_run = redis::cmd("ACL");
        dry_run.arg("DRYRUN").arg(user).arg("PUBLISH").arg(channel).arg("");
        match connection.call(&dry_run, 0).await.map(redis::from_redis_value::<String>) {
            Ok(Ok(answer)) if answer != "OK" => Err(PublishError::new(Fault::Misconfigured, "NOPERM", answer)),
            _ => Ok(()),
        }
    }

    /// Returns the type of a key, as Redis names it, or `none` if there is no such key.
    pub(in crate::sink) async fn key_type(&self, key: &str) -> Result<String, PublishError> {
        let (_, mut connection) = self.connection().await?;
        let answer = connection.call(redis::cmd("TYPE").arg(key), slot_of(key.as_bytes())).await;
        answer.and_then(|kind| Ok(redis::from_redis_value(kind)?)).map_err(call_error)
    }

    /// Whether the stream has used up its ids. `false` also if there is no stream or the user may not ask.
    pub(in crate::sink) async fn is_exhausted(&self, stream: &str) -> bool {
        let Ok((_, mut connection)) = self.connection().await else { return false };
        let mut command = redis::cmd("XINFO");
        command.arg("STREAM").arg(stream);
        let Ok(answer) = connection.call(&command, slot_of(stream.as_bytes())).await else { return false };
        let Ok(facts) = Vec::<Value>::from_redis_value(answer) else { return false };
        let text = |value: &Value| String::from_redis_value(value.clone()).ok();
        facts.chunks(2).any(|fact| {
            text(&fact[0]).as_deref() == Some("last-generated-id")
                && fact.get(1).and_then(text).as_deref() == Some("18446744073709551615-18446744073709551615")
        })
    }
}

//! The options by which commands choose dead letters and events: the same for all of them.

use std::time::Duration;

use clap::Args;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::cli::run::explained;
use crate::outbox::mend::{Filter, Mend};

/// Every option that is given must fit.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Which")]
pub(super) struct FilterArgs {
    /// A glob over the event type: * matches any characters, ? one.
    #[arg(long = "type", value_name = "GLOB")]
    event_type: Option<String>,
    /// The key, as in order:42; or its second half alone.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// The destination; '' is an event that no route took.
    #[arg(long, value_name = "NAME")]
    pub(super) destination: Option<String>,
    /// The code of the error, as in WRONGTYPE or unrouted.
    #[arg(long, value_name = "CODE")]
    error: Option<String>,
    /// Not before this time: 2h or 7d ago, or 2026-11-29T13:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Before this time.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// The id; several with commas, or given several times.
    #[arg(long = "id", value_name = "ID", value_delimiter = ',', value_parser = clap::value_parser!(i64).range(1..))]
    ids: Vec<i64>,
}

/// A time as people give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Ago(Duration),
    At(OffsetDateTime),
}

fn moment(text: &str) -> Result<Moment, String> {
    if let Ok(ago) = humantime::parse_duration(text.trim()) {
        return Ok(Moment::Ago(ago));
    }
    let at = OffsetDateTime::parse(text.trim(), &Rfc3339).map(Moment::At);
    at.map_err(|_| "a time ago, such as 2h or 7d, or a time such as 2026-11-29T13:00:00Z".to_owned())
}

impl FilterArgs {
    /// Returns whether no option was given.
    pub(super) fn is_empty(&self) -> bool {
        let Self { event_type, key, destination, error, since, until, ids } = self;
        let texts = [event_type, key, destination, error];
        texts.iter().all(|text| text.is_none()) && since.is_none() && until.is_none() && ids.is_empty()
    }

    /// Returns the filter. Times that were given as a time ago are counted back from now by the database's clock, so that all
    /// batches of a command choose alike, and a wrong clock of this host does no harm.
    pub(super) async fn filter(&self, mend: &mut dyn Mend) -> anyhow::Result<Filter> {
        let is_ago = |moment: &Option<Moment>| matches!(moment, Some(Moment::Ago(_)));
        let now = if is_ago(&self.since) || is_ago(&self.until) {
            mend.now().await.map_err(explained)?
        } else {
            OffsetDateTime::UNIX_EPOCH
        };
        let time = |moment: &Option<Moment>| {
            moment.map(|moment| match moment {
                Moment::At(time) => time,
                // The year 0 is as long ago as anybody can mean.
                Moment::Ago(ago) => time::Duration::try_from(ago)
                    .ok()
                    .and_then(|ago| now.checked_sub(ago))
                    .unwrap_or(OffsetDateTime::UNIX_EPOCH),
            })
        };
        let (mut ids, since, until) = (self.ids.clone(), time(&self.since), time(&self.until));
        ids.sort_unstable();
        ids.dedup();
        Ok(Filter {
            event_type: self.event_type.clone(),
            key: self.key.clone(),
            destination: self.destination.clone(),
            error: self.error.clone(),
            since,
            until,
            ids,
            state: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_given_as_a_time_ago_or_as_a_date_with_its_offset() {
        assert_eq!(moment("2h"), Ok(Moment::Ago(Duration::from_secs(7200))));
        assert_eq!(moment(" 7d "), Ok(Moment::Ago(Duration::from_secs(7 * 86400))));
        let at = moment("2026-11-29T13:00:00+02:00").expect("a time");
        assert_eq!(at, moment("2026-11-29T11:00:00Z").expect("a time"));
        for text in ["", "yesterday", "2026-11-29", "2", "-2h", "2026-13-29T11:00:00Z"] {
            assert!(moment(text).expect_err(text).contains("such as 2h"), "{text}");
        }
    }
}

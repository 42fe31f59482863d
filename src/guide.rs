#![doc = include_str!("guide/links.md")]
#![doc = include_str!("guide/README.md")]
// The chapters are Markdown files, so that a forge shows them too. A link in a chapter has a label, `[text][label]`, and the
// last lines of the chapter define the label as the forge needs it: `[label]: operating.md#stopping`. The pages of rustdoc lie
// elsewhere. So `links.md` comes first and defines every label as rustdoc needs it. If a label is defined twice, Markdown uses
// the first definition. `tests/check_links.py` holds the two to each other.

macro_rules! chapter {
    ($name:ident, $file:literal) => {
        chapter!($name, $file, {});
    };
    ($name:ident, $file:literal, { $($page:item)* }) => {
        #[doc = include_str!("guide/links.md")]
        #[doc = include_str!($file)]
        pub mod $name { $($page)* }
    };
}

chapter!(emitting, "guide/emitting.md");
chapter!(consuming, "guide/consuming.md");
chapter!(library, "guide/library.md");
chapter!(configuration, "guide/configuration.md");
chapter!(destinations, "guide/destinations.md", {
    chapter!(redis, "guide/destinations/redis.md");
    chapter!(redis_stream, "guide/destinations/redis-stream.md");
    chapter!(redis_pubsub, "guide/destinations/redis-pubsub.md");
    chapter!(eventbridge, "guide/destinations/eventbridge.md");
    chapter!(stdout, "guide/destinations/stdout.md");
    chapter!(file, "guide/destinations/file.md");
});
chapter!(operating, "guide/operating.md");
chapter!(monitoring, "guide/monitoring.md");
chapter!(status, "guide/status.md");
chapter!(metrics, "guide/metrics.md");
chapter!(alerts, "guide/alerts.md");
chapter!(failures, "guide/failures.md");
chapter!(dead_letters, "guide/dead-letters.md");
chapter!(replay, "guide/replay.md");
chapter!(tables, "guide/tables.md");
chapter!(postgresql, "guide/postgresql.md");
chapter!(sqlite, "guide/sqlite.md");
chapter!(guarantees, "guide/guarantees.md");
chapter!(reliability, "guide/reliability.md");
chapter!(performance, "guide/performance.md");
chapter!(adding_a_destination, "guide/adding-a-destination.md");

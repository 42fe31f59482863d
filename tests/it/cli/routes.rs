//! `relay routes`: where an event would go, and why. It connects to nothing.

use serde_json::{Value, json};

use super::{STDOUT, file};
use crate::binary::finished;

const FILE: &str = r#"
[destinations.orders]
type = "redis-stream"
url = "redis://127.0.0.1:1"
stream = "{source}:{aggregate_type}:{event_type}"

[destinations.archive]
type = "file"
path = "/var/lib/relay/events.jsonl"

[[routes]]
event_type = "order.*"
destinations = ["orders"]

[[routes]]
source = "shop"
headers = { tenant = "acme" }
destinations = ["archive", "orders"]

[[routes]]
event_type = "debug.*"
destinations = []
"#;

fn routes(args: &[&str], variables: &[(&str, &str)]) -> Value {
    let found = finished(&[&["routes", "--json"], args].concat(), variables).exited(0);
    assert_eq!(found.stderr, "");
    serde_json::from_str(&found.stdout).unwrap()
}

#[test]
fn each_route_that_takes_an_event_is_shown_with_the_places_it_leads_to() {
    let file = file(FILE);
    let variables = [("RELAY_CONFIG", file.path().to_str().unwrap())];
    let args = ["order.created", "--source", "shop", "--header", "tenant=acme", "--key", "order:42"];
    let found = routes(&args, &variables);
    assert_eq!(found["outcome"], "published");
    let numbers: Vec<&Value> = found["routes"].as_array().unwrap().iter().map(|route| &route["number"]).collect();
    assert_eq!(numbers, [1, 2]);
    let places = found["destinations"].as_array().unwrap();
    let orders = places.iter().find(|place| place["name"] == "orders").unwrap();
    assert_eq!((&orders["place"], &orders["routes"]), (&json!("shop:order:order.created"), &json!([1, 2])));
    let archive = places.iter().find(|place| place["name"] == "archive").unwrap();
    assert_eq!((&archive["place"], &archive["routes"]), (&json!("/var/lib/relay/events.jsonl"), &json!([2])));

    let text = finished(&[&["routes"][..], &args].concat(), &variables).exited(0).stdout;
    for part in [
        "order.created is published: ",
        "  1  [event_type order.* to orders]\n",
        "shop:order:order.created  (redis-stream ",
        ", by routes 1, 2\n",
    ] {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }

    let other = routes(&["order.created", "--source", "shop", "--header", "tenant=other"], &variables);
    assert_eq!(other["routes"].as_array().unwrap().len(), 1);
    assert_eq!(other["destinations"][0]["place"], "shop::order.created");
}

#[test]
fn an_event_that_goes_nowhere_is_told_with_the_reason() {
    let file = file(FILE);
    let variables = [("RELAY_CONFIG", file.path().to_str().unwrap())];
    let dropped = routes(&["debug.noise"], &variables);
    assert_eq!((&dropped["outcome"], &dropped["destinations"]), (&json!("dropped"), &json!([])));
    assert!(dropped["why"].as_str().unwrap().contains("leads nowhere"), "{dropped}");
    let unrouted = routes(&["invoice.sent"], &variables);
    assert_eq!((&unrouted["outcome"], &unrouted["routes"]), (&json!("dead_lettered"), &json!([])));
    let drop = [variables[0], ("RELAY_UNROUTED", "drop")];
    assert_eq!(routes(&["invoice.sent"], &drop)["outcome"], "dropped");
    let all = routes(&["anything"], &[STDOUT]);
    assert_eq!((&all["destinations"][0]["name"], &all["destinations"][0]["place"]), (&json!("stdout"), &json!(null)));
    assert!(all["why"].as_str().unwrap().contains("no routes"), "{all}");
}

#[test]
fn an_event_that_cannot_be_emitted_is_wrong_usage() {
    for (args, part) in [
        (&["routes"][..], "<TYPE>"),
        (&["routes", ""], "1 to 128 characters"),
        (&["routes", "a", "--header", "type=b"], "\"type\""),
        (&["routes", "a", "--header", "b"], "name=value"),
    ] {
        let refused = finished(args, &[STDOUT]).exited(2).says(&[part]);
        assert_eq!(refused.stdout, "", "{args:?}");
    }
    finished(&["routes", "a"], &[]).exited(2).says(&["no destination is configured"]);
}

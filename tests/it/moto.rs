//! EventBridge and SQS as moto emulates them: a bus whose events can be read from a queue.

use outbox_relay::sink::Format;
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use serde_json::{Value, json};

use crate::servers::Server;
use crate::support::{eventbridge_config, sdk};

/// A bus, its queues, and one rule a queue that sends events from the bus to the queue. It is meant for a few hundred events:
/// whenever a message comes or goes, moto's queue looks at every message that it holds.
pub(crate) struct MotoBus {
    url: String,
    name: String,
    queue_urls: Vec<String>,
}

impl MotoBus {
    /// Creates a bus with one queue, which keeps the order.
    pub(crate) fn create(server: &Server, name: &str) -> Self {
        let everything = json!({ "source": [{ "prefix": "" }] });
        Self::with_queues(server, name, vec![everything])
    }

    /// Creates a bus with four queues. The first digit of an event's id chooses the queue. This is quicker, and keeps no
    /// order.
    pub(crate) fn with_4_queues(server: &Server, name: &str) -> Self {
        let patterns = ["0123", "4567", "89ab", "cdef"].map(|digits| {
            let prefixes: Vec<Value> = digits.chars().map(|digit| json!({ "prefix": digit.to_string() })).collect();
            json!({ "detail": { "id": prefixes } })
        });
        Self::with_queues(server, name, patterns.to_vec())
    }

    fn with_queues(server: &Server, name: &str, patterns: Vec<Value>) -> Self {
        let url = server.url().to_owned();
        call(&url, "events", "AWSEvents.CreateEventBus", json!({ "Name": name }));
        let mut queue_urls = Vec::new();
        for (number, pattern) in patterns.into_iter().enumerate() {
            let name_of_both = format!("{name}-{number}");
            let queue = call(&url, "sqs", "AmazonSQS.CreateQueue", json!({ "QueueName": name_of_both }));
            let wanted = json!({ "QueueUrl": queue["QueueUrl"], "AttributeNames": ["QueueArn"] });
            queue_urls.push(text(&queue["QueueUrl"]));
            let attributes = call(&url, "sqs", "AmazonSQS.GetQueueAttributes", wanted);
            let rule = json!({ "Name": name_of_both, "EventBusName": name, "EventPattern": pattern.to_string() });
            call(&url, "events", "AWSEvents.PutRule", rule);
            // Like a rule without a transformer, this one sends the whole event. moto takes 20 ms to build its default
            // transformer.
            let whole = json!({ "InputPathsMap": { "event": "$" }, "InputTemplate": "<event>" });
            let target =
                json!({ "Id": "queue", "Arn": attributes["Attributes"]["QueueArn"], "InputTransformer": whole });
            let put = json!({ "Rule": name_of_both, "EventBusName": name, "Targets": [target] });
            call(&url, "events", "AWSEvents.PutTargets", put);
        }
        Self { url, name: name.to_owned(), queue_urls }
    }

    /// Returns a sink for the bus.
    pub(crate) fn sink(&self, format: Format) -> EventBridge {
        let config = EventBridgeConfig { bus: self.name.clone(), format, ..eventbridge_config(&self.url) };
        EventBridge::with_sdk_config(&sdk(), config)
    }

    /// Returns the events that came since the last call, in order, as the rule forwarded them: moto has parsed `detail` and
    /// serialised it again.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.queue_urls.iter().flat_map(|queue| self.events_of(queue)).collect()
    }

    fn events_of(&self, queue_url: &str) -> Vec<Value> {
        let request = json!({ "QueueUrl": queue_url, "MaxNumberOfMessages": 10 });
        let mut events = Vec::new();
        loop {
            let answer = call(&self.url, "sqs", "AmazonSQS.ReceiveMessage", request.clone());
            let Some(messages) = answer["Messages"].as_array().filter(|messages| !messages.is_empty()) else {
                return events;
            };
            let receipts = messages
                .iter()
                .enumerate()
                .map(|(id, message)| json!({ "Id": id.to_string(), "ReceiptHandle": message["ReceiptHandle"] }));
            let received = json!({ "QueueUrl": queue_url, "Entries": receipts.collect::<Vec<Value>>() });
            call(&self.url, "sqs", "AmazonSQS.DeleteMessageBatch", received);
            events
                .extend(messages.iter().map(|message| serde_json::from_str::<Value>(&text(&message["Body"])).unwrap()));
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

fn call(url: &str, service: &str, operation: &str, request: Value) -> Value {
    let credential = format!("AWS4-HMAC-SHA256 Credential=id/20260101/eu-west-1/{service}/aws4_request");
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut response = agent
        .post(url)
        .header("authorization", credential)
        .header("x-amz-target", operation)
        .header("content-type", "application/x-amz-json-1.1")
        .send(request.to_string())
        .unwrap();
    let answer = response.body_mut().read_to_string().unwrap();
    assert!(response.status().is_success(), "{operation} {request}: {answer}");
    if answer.is_empty() { Value::Null } else { serde_json::from_str(&answer).unwrap() }
}

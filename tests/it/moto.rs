//! EventBridge and SQS as moto has them: a bus whose events can be read back from a queue.

use std::time::{Duration, Instant};

use outbox_relay::sink::Format;
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use serde_json::{Value, json};

use crate::servers::Server;
use crate::support::{eventbridge_config, sdk};

/// A bus, a queue, and a rule that sends everything from the one to the other. For some hundred events: moto's queue looks
/// at every message it holds for each one that comes or goes.
pub(crate) struct MotoBus {
    url: String,
    name: String,
    queue_url: String,
}

impl MotoBus {
    pub(crate) fn create(server: &Server, name: &str) -> Self {
        let url = server.url().to_owned();
        call(&url, "events", "AWSEvents.CreateEventBus", json!({ "Name": name }));
        let queue_url = text(&call(&url, "sqs", "AmazonSQS.CreateQueue", json!({ "QueueName": name }))["QueueUrl"]);
        let wanted = json!({ "QueueUrl": queue_url, "AttributeNames": ["QueueArn"] });
        let queue = call(&url, "sqs", "AmazonSQS.GetQueueAttributes", wanted);
        let everything = json!({ "source": [{ "prefix": "" }] }).to_string();
        let rule = json!({ "Name": "all", "EventBusName": name, "EventPattern": everything });
        call(&url, "events", "AWSEvents.PutRule", rule);
        // The whole event, as without a transformer; but moto takes 20 ms to put its default one together.
        let whole = json!({ "InputPathsMap": { "event": "$" }, "InputTemplate": "<event>" });
        let targets = json!([{ "Id": "queue", "Arn": queue["Attributes"]["QueueArn"], "InputTransformer": whole }]);
        let put = json!({ "Rule": "all", "EventBusName": name, "Targets": targets });
        call(&url, "events", "AWSEvents.PutTargets", put);
        Self { url, name: name.to_owned(), queue_url }
    }

    /// A sink for the bus.
    pub(crate) fn sink(&self, format: Format) -> EventBridge {
        let config = EventBridgeConfig { bus: self.name.clone(), format, ..eventbridge_config(&self.url) };
        EventBridge::with_sdk_config(&sdk(), config)
    }

    /// The events that came since the last call, in order, as the rule sent them on: moto has parsed `detail` and printed
    /// it anew.
    pub(crate) fn events(&self) -> Vec<Value> {
        let request = json!({ "QueueUrl": self.queue_url, "MaxNumberOfMessages": 10 });
        let mut events = Vec::new();
        loop {
            let answer = call(&self.url, "sqs", "AmazonSQS.ReceiveMessage", request.clone());
            let Some(messages) = answer["Messages"].as_array().filter(|messages| !messages.is_empty()) else {
                return events;
            };
            events
                .extend(messages.iter().map(|message| serde_json::from_str::<Value>(&text(&message["Body"])).unwrap()));
        }
    }

    /// Takes the events as they come, until there are as many, or for a minute: moto's queue is quick while it is short.
    pub(crate) fn take(&self, count: usize) -> Vec<Value> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut events = self.events();
        while events.len() < count && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
            events.extend(self.events());
        }
        events
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

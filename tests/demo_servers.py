#!/usr/bin/env python3
"""A demonstration on throwaway servers: a shop's committed orders reach Redis and EventBridge, and a poison event is
dead-lettered and redriven. It ends by itself and leaves nothing behind. `make demo-servers` installs what it needs and runs
it."""
import json
import os
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request

from throwaway import RELAY, ROOT, Server, psql, redis_cli

SHOP = os.path.join(ROOT, "target", "release", "examples", "shop")
AWS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_REGION": "eu-west-1"}
# moto reads the region and the service from the credential's scope. It does not check the signature.
SIGNATURE = "AWS4-HMAC-SHA256 Credential=demo/20260101/eu-west-1/{}/aws4_request, SignedHeaders=host, Signature=0"


def title(text):
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def run(environment, *command, expect=0):
    shown = " ".join(os.path.basename(word) if word in (RELAY, SHOP) else word for word in command)
    print(f"$ {shown}", flush=True)
    status = subprocess.run(command, env={**os.environ, **environment}).returncode
    if status != expect:
        sys.exit(f"{shown} ended with {status}, expected {expect}")


def events_api(moto, operation, **parameters):
    request = urllib.request.Request(moto.url, json.dumps(parameters).encode(), {
        "Content-Type": "application/x-amz-json-1.1",
        "X-Amz-Target": f"AWSEvents.{operation}",
        "Authorization": SIGNATURE.format("events"),
    })
    return json.load(urllib.request.urlopen(request))


def queue_api(moto, action, **parameters):
    body = urllib.parse.urlencode({"Action": action, **parameters}).encode()
    request = urllib.request.Request(moto.url, body, {"Authorization": SIGNATURE.format("sqs"), "Accept": "application/json"})
    return urllib.request.urlopen(request).read().decode()


def subscribe(moto):
    """Makes a bus that sends every event to a queue, from which the demonstration reads."""
    events_api(moto, "CreateEventBus", Name="shop")
    queue_api(moto, "CreateQueue", QueueName="seen")
    events_api(moto, "PutRule", Name="all", EventBusName="shop", EventPattern='{"source": [{"prefix": ""}]}')
    events_api(moto, "PutTargets", Rule="all", EventBusName="shop",
               Targets=[{"Id": "queue", "Arn": "arn:aws:sqs:eu-west-1:123456789012:seen"}])


def received(moto):
    import xml.etree.ElementTree as tree
    answer = queue_api(moto, "ReceiveMessage", QueueUrl=f"{moto.url}/123456789012/seen", MaxNumberOfMessages="10")
    bodies = [element.text for element in tree.fromstring(answer).iter() if element.tag.rpartition("}")[2] == "Body"]
    return [json.loads(body) for body in bodies]


def show_stream(redis):
    entries = json.loads(redis_cli(redis, "--json", "xrange", "events", "-", "+"))
    for entry_id, fields in entries:
        field = dict(zip(fields[::2], fields[1::2]))
        data = field["data"] if len(field["data"]) < 80 else field["data"][:60] + "... (%d bytes)" % len(field["data"])
        print(f"{entry_id}  sequence={field['sequence']}  {field['type']:14} key={field.get('partitionkey', '-'):8} {data}")


def show(database, statement):
    print(psql(database, statement, "-P", "pager=off"))


def main():
    with Server("postgres") as database, Server("redis") as redis, Server("moto") as moto, tempfile.TemporaryDirectory() as home:
        environment = {
            **AWS, "HOME": home, "DATABASE_URL": database.url, "REDIS_URL": redis.url, "AWS_ENDPOINT_URL": moto.url,
            "AWS_EVENTBRIDGE_BUS_NAME": "shop", "EVENT_MAX_PAYLOAD_SIZE": "1000", "RELAY_LOG_FORMAT": "text",
        }
        subscribe(moto)

        title("1. The tables")
        run(environment, RELAY, "migrate")

        title("2. A shop commits orders with their events, and rolls one back")
        run(environment, SHOP)
        print("and one event with a payload over the limit of this demo, 1,000 bytes")
        psql(database, "select emit_event('report.made', jsonb_build_object('pages', repeat('x', 2000)))")
        show(database, "select id, event_type, aggregate_id, status, octet_length(payload::text) as bytes from event_outbox order by id")

        title("3. The relay publishes what is due (exit code 3: something was dead-lettered)")
        run(environment, RELAY, "--once", expect=3)

        title("4. What arrived in the Redis Stream: no order of mallory's, whose transaction rolled back")
        show_stream(redis)

        title("5. What arrived on the EventBridge bus")
        for event in sorted(received(moto), key=lambda event: int(event["detail"]["sequence"])):
            print(f"{event['id']}  sequence={event['detail']['sequence']}  {event['detail-type']:14} {json.dumps(event['detail']['data'])}")

        title("6. The processing log")
        show(database, "select outbox_id, event_type, destination, status, attempt, duration_ms, error from event_processing_log order by outbox_id, destination")

        title("7. The dead letter")
        show(database, "select id, event_type, destination, attempts, error_code, error from event_dead_letter")

        title("8. Redriven, with a limit that lets it pass")
        show(database, "select redrive_dead_letter(id) as event_id from event_dead_letter")
        run({**environment, "EVENT_MAX_PAYLOAD_SIZE": "100000"}, RELAY, "--once")
        show_stream(redis)
        show(database, "select id, event_type, redriven_at is not null as redriven from event_dead_letter")

        orders = redis_cli(redis, "--json", "xrange", "events", "-", "+")
        left = psql(database, "select count(*) from event_outbox")
        if "mallory" in orders or len(json.loads(orders)) != 5 or left != "0":
            sys.exit("the demo did not end as it should")
        title("Done: five events committed, five arrived, the one rolled back did not. Servers and data are gone.")


if __name__ == "__main__":
    main()

//! Redis's answers to a chunk: any bytes may come. Only its own reply makes an event delivered.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outbox_relay::event::{Fault, Outcome};
use outbox_relay::sink::redis::fuzzing::publish;

fuzz_target!(|data: &[u8]| {
    let [first, rest @ ..] = data else { return };
    let (one_key, count) = (first & 1 == 1, usize::from(first >> 1) % 5);
    let keys = ["{events}:relay:o:redis:1".to_owned()];

    // The input as the bytes from the network.
    for outcome in publish(rest, &keys, count, one_key).into_iter().flatten() {
        if let Outcome::Delivered { message_id } = outcome {
            let id = message_id.expect("the entry's id");
            assert!(!id.is_empty() && !id.starts_with('-'));
            assert!(String::from_utf8_lossy(rest).contains(&id) || id.contains('\u{fffd}'), "an id that is in no reply");
        }
    }

    // The input as a valid answer with a reply a line. The number of replies may differ from the number of events.
    let replies: Vec<&[u8]> = rest.split(|byte| *byte == b'\n').collect();
    let answer = [format!("${}\r\n", rest.len()).as_bytes(), rest, b"\r\n"].concat();
    let outcomes = publish(&answer, &keys, count, one_key).expect("this is not a valid state");
    assert_eq!(outcomes.len(), count);
    for (at, outcome) in outcomes.iter().enumerate() {
        if replies.len() != count {
            assert!(matches!(outcome, Outcome::Failed(error) if error.fault == Fault::Unknown));
            continue;
        }
        match replies[at] {
            [] => assert_eq!(*outcome, Outcome::Held),
            [b'-', ..] => {
                let Outcome::Failed(error) = outcome else { panic!("an error counted as a delivery") };
                assert!(!error.message.contains('\0') && !error.code.contains('\0'));
                assert!(error.message.chars().count() <= 500 && error.code.chars().count() <= 500);
            }
            reply => {
                let id = String::from_utf8_lossy(reply).into_owned();
                assert_eq!(*outcome, Outcome::Delivered { message_id: Some(id) });
            }
        }
    }
});

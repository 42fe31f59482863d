use super::*;

const JUDGEMENT: Judgement = Judgement { recorded_since: EntryId(0, 0), trimmed: 0, in_sequence: true };

fn id(sequence: i64) -> Uuid {
    Uuid::from_u128(sequence.unsigned_abs().into())
}

fn entry(place: u64, sequence: i64) -> Entry<'static> {
    let checksum = Checksum::of(sequence.to_string().as_bytes());
    Entry { id: EntryId(1000, place), event_id: id(sequence), sequence, key: Some("k"), checksum }
}

fn promise(sequence: i64) -> Obligation {
    let digest = ring::digest::digest(&ring::digest::SHA256, sequence.to_string().as_bytes());
    let sha256 = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Obligation { event_id: id(sequence), key: Some("k".into()), sequence, sha256: Some(sha256), committed: Some(true) }
}

/// Audits events 1 to 5, all in order, published and recorded, with these changes.
fn audit(
    change_entries: impl FnOnce(&mut Vec<Entry<'static>>),
    change_known: impl FnOnce(&mut Vec<(i64, Fact)>),
    change_promises: impl FnOnce(&mut Vec<Obligation>),
) -> Report {
    let mut entries: Vec<Entry<'_>> = (1..=5).map(|sequence: i64| entry(sequence.unsigned_abs(), sequence)).collect();
    let mut known: Vec<(i64, Fact)> = (1..=5)
        .map(|sequence: i64| (sequence, Fact::Published(Some(EntryId(1000, sequence.unsigned_abs())))))
        .collect();
    let mut promises: Vec<Obligation> = (1..=5).map(promise).collect();
    change_entries(&mut entries);
    change_known(&mut known);
    change_promises(&mut promises);
    let mut audit = Audit::default();
    entries.iter().for_each(|entry| audit.entry(entry));
    known.into_iter().for_each(|(sequence, known)| audit.known(id(sequence), sequence, known, None));
    promises.iter().for_each(|promise| audit.obligation(promise));
    audit.finish(JUDGEMENT)
}

fn nothing<T>(_: &mut T) {}

fn only(report: &Report, finding: Finding) {
    assert_eq!(report.counts.iter().collect::<Vec<_>>(), [(&finding, &1)], "{report:?}");
}

#[test]
fn what_is_right_is_clean() {
    let report = audit(nothing, nothing, nothing);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.entries, report.events, report.repeats), (5, 5, 0));
    assert!(audit(nothing, nothing, Vec::clear).is_clean());
    assert!(audit(nothing, nothing, |promises| promises[2].committed = None).is_clean());
}

#[test]
fn a_loss_is_found() {
    // The event is nowhere, and only the producer knows it.
    let report = audit(
        |entries| *entries = [&entries[..2], &entries[2 + 1..]].concat(),
        |known| *known = [&known[..2], &known[3..]].concat(),
        nothing,
    );
    only(&report, Finding::Lost);
    // The event is recorded as published and not in the stream. The log shows it.
    only(&audit(|entries| *entries = [&entries[..2], &entries[2 + 1..]].concat(), nothing, Vec::clear), Finding::Lost);
}

#[test]
fn what_is_owed_or_dead_lettered_is_not_lost() {
    for state in [Fact::Pending, Fact::DeadLetter] {
        let report = audit(
            |entries| *entries = [&entries[..2], &entries[2 + 1..]].concat(),
            |known| known[2].1 = state,
            nothing,
        );
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn an_inversion_is_found_with_and_without_the_producers() {
    let swap = |entries: &mut Vec<Entry<'static>>| {
        entries.swap(1, 2);
        (entries[1].id, entries[2].id) = (entries[2].id, entries[1].id);
    };
    let swap_known = |known: &mut Vec<(i64, Fact)>| (known[1].1, known[2].1) = (known[2].1, known[1].1);
    only(&audit(swap, swap_known, nothing), Finding::Inversion);
    only(&audit(swap, swap_known, Vec::clear), Finding::Inversion);
}

#[test]
fn a_repeat_is_counted_and_is_no_inversion() {
    let report = audit(|entries| entries.push(entry(9, 2)), nothing, nothing);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.repeats, 1);
}

#[test]
fn a_ghost_is_found() {
    only(&audit(nothing, nothing, |promises| promises[3].committed = Some(false)), Finding::Ghost);
    only(&audit(nothing, |known| known.truncate(4), Vec::clear), Finding::Ghost);
}

#[test]
fn a_changed_byte_is_found() {
    only(&audit(|entries| entries[4].checksum = Checksum::of(b"6"), nothing, nothing), Finding::Changed);
    let mut audit = Audit::default();
    audit.entry(&entry(1, 1));
    audit.known(id(1), 1, Fact::Published(Some(EntryId(1000, 1))), Some(Checksum::of(b"2")));
    only(&audit.finish(JUDGEMENT), Finding::Changed);
}

#[test]
fn a_log_that_does_not_agree_is_found() {
    // The event arrived and is recorded nowhere.
    only(&audit(nothing, |known| known.truncate(4), nothing), Finding::Disagreement);
    // The event is still owed and also recorded.
    only(&audit(nothing, |known| known.push((3, Fact::Pending)), nothing), Finding::Disagreement);
    // The event is recorded with another event's entry.
    let report = audit(nothing, |known| known[0].1 = Fact::Published(Some(EntryId(1000, 2))), nothing);
    only(&report, Finding::Disagreement);
}

#[test]
fn a_lost_tail_and_a_lost_stream_are_found_and_what_came_later_is_not_missed() {
    let report = audit(|entries| entries.truncate(3), nothing, Vec::clear);
    assert_eq!(report.count(Finding::Lost), 2, "{report:?}");
    let report = audit(Vec::clear, nothing, Vec::clear);
    assert_eq!(report.count(Finding::Lost), 5, "{report:?}");
    let mut audit = Audit::default();
    audit.entry(&entry(1, 1));
    for sequence in 1..=2_i64 {
        audit.known(id(sequence), sequence, Fact::Published(Some(EntryId(1000, sequence.unsigned_abs()))), None);
    }
    audit.later_entry(id(2));
    assert!(audit.finish(JUDGEMENT).is_clean());
}

#[test]
fn what_was_trimmed_is_not_lost_and_no_more_than_that() {
    for (trimmed, lost) in [(2, 0), (1, 1)] {
        let mut audit = Audit::default();
        (3..=5).for_each(|sequence: i64| audit.entry(&entry(sequence.unsigned_abs(), sequence)));
        for sequence in 1..=5_i64 {
            audit.known(id(sequence), sequence, Fact::Published(Some(EntryId(1000, sequence.unsigned_abs()))), None);
        }
        (1..=5).for_each(|sequence| audit.obligation(&promise(sequence)));
        let report = audit.finish(Judgement { trimmed, ..JUDGEMENT });
        assert_eq!(report.count(Finding::Lost), lost, "{report:?}");
    }
}

#[test]
fn a_redriven_event_may_come_late_and_being_recorded_twice_is_found() {
    let late = |entries: &mut Vec<Entry<'static>>| {
        let first = entries.remove(0);
        entries.push(Entry { id: EntryId(1000, 9), ..first });
    };
    let recorded = |known: &mut Vec<(i64, Fact)>| known[0].1 = Fact::Published(Some(EntryId(1000, 9)));
    let redriven = |known: &mut Vec<(i64, Fact)>| {
        recorded(known);
        known.push((1, Fact::Redriven));
    };
    assert!(audit(late, redriven, Vec::clear).is_clean());
    assert!(audit(late, recorded, Vec::clear).count(Finding::Inversion) > 0);
    only(&audit(nothing, |known| known.push(known[1]), nothing), Finding::Disagreement);
    only(&audit(nothing, |known| known.push((2, Fact::DeadLetter)), nothing), Finding::Disagreement);
}

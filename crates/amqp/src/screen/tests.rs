//! What lapin gets to read is parsed here by its own parser, in a thread as small as its own.

use std::thread;

use amq_protocol::{
    frame::{AMQPFrame, parse_frame},
    protocol::{
        AMQPClass,
        basic::{AMQPMethod, AMQPProperties},
    },
    types::{AMQPValue, FieldTable},
};
use proptest::{collection::vec, prelude::*};

use super::Screen;
use crate::REMOVED;

const AGREED: u32 = 131_072;
/// The deepest that fits into a frame of 128 KiB: an array costs five bytes a level.
const DEEPEST: usize = 26_000;

/// What comes out for these frames, however they are cut up.
fn screened(frames: &[Vec<u8>], piece: usize) -> Vec<u8> {
    let mut screen = Screen { ours: AGREED, limit: AGREED, ..Screen::default() };
    let mut out = Vec::new();
    let mut buffer = vec![0; 1000];
    for piece in frames.concat().chunks(piece) {
        screen.push(piece).unwrap();
        loop {
            let count = screen.pop(&mut buffer);
            if count == 0 {
                break;
            }
            out.extend_from_slice(&buffer[..count]);
        }
    }
    out
}

/// As lapin reads it, on a thread like lapin's.
fn parsed(bytes: Vec<u8>) -> Vec<AMQPFrame> {
    thread::Builder::new().stack_size(2 << 20).spawn(move || parse(&bytes)).unwrap().join().unwrap()
}

fn parse(mut rest: &[u8]) -> Vec<AMQPFrame> {
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let (behind, frame) = parse_frame(rest).expect("lapin can read it");
        let length = rest.len() - behind.len();
        assert!(length <= AGREED as usize, "a frame of {length} bytes");
        frames.push(frame);
        rest = behind;
    }
    frames
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, 1], length(payload.len()).as_slice(), payload, &[0xCE]].concat()
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap().to_be_bytes()
}

fn text(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

fn entry(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [text(name).as_slice(), &[kind], value].concat()
}

fn long(name: &[u8], value: &[u8]) -> Vec<u8> {
    entry(name, b'S', &[length(value.len()).as_slice(), value].concat())
}

/// An array in an array, and so on.
fn nested(name: &[u8], levels: usize) -> Vec<u8> {
    let value = (0..levels).fold(Vec::new(), |within: Vec<u8>, _| {
        let mut outer = vec![b'A'];
        outer.extend(length(within.len()));
        outer.extend(within);
        outer
    });
    [text(name), value].concat()
}

/// The same with tables, which have a name on each level.
fn tables(name: &[u8], levels: usize) -> Vec<u8> {
    // From the inside out would copy each level again; the lengths are known beforehand.
    let mut value = Vec::new();
    for level in (0..levels).rev() {
        value.push(b'F');
        value.extend(length(level * 6));
        if level > 0 {
            value.push(0);
        }
    }
    [text(name), value].concat()
}

/// A header with headers, a `message_id` and an `app_id`.
fn header(table: &[u8], id: &[u8]) -> Vec<u8> {
    let flags: u16 = 1 << 13 | 1 << 7 | 1 << 3;
    let fixed = [&[0, 60, 0, 0], 5u64.to_be_bytes().as_slice(), &flags.to_be_bytes()].concat();
    let payload = [fixed, length(table.len()).to_vec(), table.to_vec(), text(id), text(b"order")].concat();
    frame(2, &payload)
}

fn deliver(routing_key: &[u8]) -> Vec<u8> {
    let tag = 7u64.to_be_bytes();
    let names = [text(b"events"), text(routing_key)].concat();
    frame(1, &[&[0, 60, 0, 60], text(b"ctag").as_slice(), &tag, &[0], &names].concat())
}

fn properties(frames: &[AMQPFrame]) -> &AMQPProperties {
    frames
        .iter()
        .find_map(|frame| match frame {
            AMQPFrame::Header(_, header) => Some(&header.properties),
            _ => None,
        })
        .unwrap()
}

fn headers(frames: &[AMQPFrame]) -> &FieldTable {
    properties(frames).headers().as_ref().unwrap()
}

/// The names that were removed.
fn removed(frames: &[AMQPFrame]) -> Vec<String> {
    match headers(frames).inner().get(REMOVED) {
        None => Vec::new(),
        Some(AMQPValue::FieldTable(removed)) => {
            removed.inner().keys().map(|name| name.as_str().to_owned()).collect()
        }
        Some(other) => panic!("{other:?}"),
    }
}

#[test]
fn what_lapin_can_read_goes_on_as_it_came() {
    let table = [
        long(b"aggregate_id", b"1"),
        nested(b"four", 4),
        tables(b"tables", 30),
        entry(b"empty", b'V', &[]),
        entry(b"price", b'D', &[2, 0, 0, 0, 1]),
        long(b"bytes", &[0xFF; 300]),
    ]
    .concat();
    let frames = [deliver(b"order.new"), header(&table, b"id"), frame(3, b"hello"), frame(8, b"")];
    for piece in [1, 7, 64, 100_000] {
        assert_eq!(screened(&frames, piece), frames.concat(), "in pieces of {piece}");
    }
    assert_eq!(parsed(frames.concat()).len(), 4);
}

#[test]
fn a_header_that_cannot_be_read_is_removed_and_the_rest_of_its_message_stays() {
    let cases: [(&str, Vec<u8>); 9] = [
        ("arrays as deep as a frame holds", nested(b"bad", 2000)),
        ("tables as deep as a frame holds", tables(b"bad", 21_000)),
        ("one level too deep", nested(b"bad", 34)),
        ("an unknown type", entry(b"bad", b'z', &[1, 2, 3])),
        ("an unknown type within", entry(b"bad", b'A', &[0, 0, 0, 2, b'z', 1])),
        ("a name within that is no text", tables_with(b"bad", &[0xFF])),
        ("a value that is longer than its table", entry(b"bad", b'S', &[0, 0, 1, 0, b'x'])),
        ("an array that is longer than its table", entry(b"bad", b'A', &[0xFF, 0xFF, 0xFF, 0xFF])),
        ("a text that ends in the middle", entry(b"bad", b'F', &[0, 0, 0, 3, 9, b'a', b'b'])),
    ];
    for (case, bad) in cases {
        let table = [long(b"aggregate_id", b"1"), bad].concat();
        let frames = [deliver(b"order.new"), header(&table, b"id"), frame(3, b"hello")];
        let frames = parsed(screened(&frames, 4096));
        assert_eq!(frames.len(), 3, "{case}");
        assert_eq!(removed(&frames), ["bad"], "{case}");
        assert_eq!(headers(&frames).inner().len(), 2, "{case}");
        assert_eq!(properties(&frames).message_id().as_ref().unwrap().as_str(), "id", "{case}");
        assert_eq!(properties(&frames).app_id().as_ref().unwrap().as_str(), "order", "{case}");
    }
}

#[test]
fn the_deepest_that_a_frame_holds_is_harmless() {
    // Built from the outside in: from the inside out each level would be copied again.
    let mut value = Vec::new();
    for level in (0..DEEPEST).rev() {
        value.push(b'A');
        value.extend(length(level * 5));
    }
    let table = [text(b"bad"), value].concat();
    let frames = parsed(screened(&[header(&table, b"id"), frame(3, b"hello")], 4096));
    assert_eq!((removed(&frames), frames.len()), (vec!["bad".to_owned()], 2));
}

#[test]
fn a_header_that_was_lengthened_beyond_the_frame_loses_what_the_broker_added_and_then_the_largest() {
    let deaths = entry(b"x-death", b'A', &length(0));
    let deaths_long = deaths_of(3_000 * 45);
    let own = long(b"own", &vec![b'x'; 100_000]);
    let cases = [
        ("as it may be", vec![deaths.clone(), own.clone()], vec![]),
        ("with the deaths", vec![deaths_long.clone(), long(b"aggregate_id", b"1")], vec!["x-death"]),
        ("with both", vec![own.clone(), deaths_long.clone()], vec!["x-death"]),
        (
            "with two",
            vec![long(b"other", &vec![b'y'; 90_000]), own.clone(), deaths_long],
            vec!["own", "x-death"],
        ),
        ("by little", vec![long(b"own", &vec![b'x'; 130_800]), deaths_of(300)], vec!["x-death"]),
        // More than is looked at: what stands behind the headers is lost with them.
        ("endless", vec![long(b"aggregate_id", b"1"), long(b"own", &vec![b'x'; 3 << 20])], vec!["own", "…"]),
    ];
    for (case, table, expected) in cases {
        let frames = parsed(screened(&[header(&table.concat(), b"id"), frame(3, b"hello")], 4096));
        assert_eq!(removed(&frames), expected, "{case}");
        assert_eq!(frames.len(), 2, "{case}");
    }
}

#[test]
fn texts_that_are_none_are_spelled_as_far_as_they_are() {
    let frames = [deliver(b"order.\xFF\xC3"), header(&[], b"\xFFid"), frame(3, b"hello")];
    let frames = parsed(screened(&frames, 16));
    assert_eq!(properties(&frames).message_id().as_ref().unwrap().as_str(), "?id");
    let AMQPFrame::Method(_, AMQPClass::Basic(AMQPMethod::Deliver(deliver))) = &frames[0] else {
        panic!("{:?}", frames[0]);
    };
    assert_eq!(deliver.routing_key.as_str(), "order.??");
}

#[test]
fn what_was_agreed_is_the_smaller_of_the_two_offers() {
    let tune = |largest: u32| {
        frame(1, &[&[0, 10, 0, 30, 0, 0], largest.to_be_bytes().as_slice(), &[0, 60]].concat())
    };
    for (theirs, agreed) in [(0, AGREED), (4096, 4096), (16_384, 16_384), (1 << 20, AGREED), (1, 4096)] {
        let mut screen = Screen { ours: AGREED, limit: AGREED, ..Screen::default() };
        screen.push(&tune(theirs)).unwrap();
        assert_eq!(screen.limit, agreed, "{theirs}");
        screen.out.clear();
        screen.push(&header(&long(b"own", &vec![b'x'; 100_000]), b"id")).unwrap();
        assert!(screen.out.len() <= agreed as usize, "{theirs}: {}", screen.out.len());
    }
}

/// What the broker notes, this long.
fn deaths_of(bytes: usize) -> Vec<u8> {
    let note = [&[b'S', 0, 0, 0, 40], format!("{:040}", 7).as_bytes()].concat();
    entry(b"x-death", b'A', &[length(bytes / 45 * 45).to_vec(), note.repeat(bytes / 45)].concat())
}

fn tables_with(name: &[u8], within: &[u8]) -> Vec<u8> {
    let within = entry(within, b'V', &[]);
    entry(name, b'F', &[length(within.len()).to_vec(), within].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Whatever stands in a header, lapin can read what comes out, and the frames behind it.
    #[test]
    fn no_header_ends_a_connection(
        flags in any::<u16>(),
        properties in vec(prop_oneof![
            4 => any::<u8>(),
            2 => prop::sample::select(b"AFSxVtbBsUuIilLTdfD".to_vec()),
            4 => Just(0u8),
            1 => 1..20u8,
        ], 0..400),
        piece in 1..50usize,
    ) {
        let fixed = [&[0, 60, 0, 0], 5u64.to_be_bytes().as_slice(), &flags.to_be_bytes()].concat();
        let frames = [frame(2, &[fixed, properties].concat()), frame(3, b"hello")];
        prop_assert_eq!(parse(&screened(&frames, piece)).len(), 2);
    }
}

//! What a message's header may be for lapin to read it, and what is left of one that is not so.
//!
//! lapin parses a header table by recursion, on a thread of 2 MiB: about 300 levels in a debug build and 2,000
//! in a release overflow it, which aborts the process (tried). It closes the connection over a frame that is
//! larger than agreed, which RabbitMQ sends when dead-lettering has lengthened the headers, and over a text that
//! is not UTF-8, which RabbitMQ does not mind. Whichever it is, the message comes again to whoever connects
//! next. So such a header is cut down to what can be read before lapin sees it.

use std::{collections::BTreeSet, fmt};

use crate::reader::Reader;

/// How deep the values of a header table may be nested. Events have at most 4 levels.
const DEPTH: usize = 32;
/// The header under which a message says what was removed from its headers: a table of names and reasons.
///
/// ```
/// # fn example(headers: &lapin::types::FieldTable) {
/// let is_complete = !headers.inner().contains_key(amqp::REMOVED);
/// # }
/// ```
pub const REMOVED: &str = "x-removed";
/// What the broker adds for each queue that a message died in. It is what grows, so it goes first.
const DEATHS: &[u8] = b"x-death";
/// How many names [`REMOVED`] lists, and how much of the frame they may take.
const LISTED: usize = 16;
/// Class, weight, size of the body, and flags.
const FIXED: usize = 14;

/// AMQP's properties in their order, the first one with the highest flag.
const PROPERTIES: [Kind; 14] = {
    use Kind::{Long, Octet, Short, Table};
    [Short, Short, Table, Octet, Octet, Short, Short, Short, Short, Long, Short, Short, Short, Short]
};
/// Which of them the headers are.
const HEADERS: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Short,
    Table,
    Octet,
    Long,
}

/// Why a header was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Deep,
    Unreadable,
    Large(usize),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deep => write!(f, "it is nested more than {DEPTH} levels deep"),
            Self::Unreadable => f.write_str("it cannot be read"),
            Self::Large(bytes) => write!(f, "with its {bytes} bytes the header does not fit into a frame"),
        }
    }
}

/// One entry of the header table.
struct Entry<'a> {
    name: &'a [u8],
    /// Name, type and value, as they came.
    raw: &'a [u8],
}

/// What was removed.
#[derive(Default)]
pub(crate) struct Removed {
    entries: Vec<(String, Fault)>,
}

impl Removed {
    fn add(&mut self, name: &[u8], fault: Fault) {
        self.entries.push((String::from_utf8_lossy(name).into_owned(), fault));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// For the log: names come from outside.
impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (name, fault)) in self.entries.iter().take(LISTED).enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{}: {fault}", name.escape_debug())?;
        }
        match self.entries.len().saturating_sub(LISTED) {
            0 => Ok(()),
            more => write!(f, ", and {more} others"),
        }
    }
}

/// A content header that lapin can read, in a frame with a payload of at most `limit` bytes; None when it is so
/// already. `whole` is false when only the beginning of it is here.
pub(crate) fn readable(payload: &[u8], whole: bool, limit: usize) -> Option<(Vec<u8>, Removed)> {
    let mut removed = Removed::default();
    let mut rest = Reader::new(payload);
    // Without these the frame is none, and lapin may say so.
    let fixed = rest.take(FIXED)?;
    let flags = u16::from_be_bytes([fixed[12], fixed[13]]);
    let mut present = 0;
    let mut fields: Vec<Vec<u8>> = Vec::new();
    let (mut entries, mut clean) = (Vec::new(), whole && payload.len() <= limit);
    for (n, kind) in PROPERTIES.into_iter().enumerate() {
        let flag = 1 << (15 - n);
        if flags & flag == 0 {
            continue;
        }
        if kind == Kind::Table {
            let (table, complete) = match rest.long() {
                Some(table) => (table, true),
                None => (rest.rest().get(4..).unwrap_or_default(), false),
            };
            clean &= complete & sort(table, &mut entries, &mut removed);
            if !complete {
                removed.add("…".as_bytes(), Fault::Unreadable);
                break;
            }
            continue;
        }
        let field = match kind {
            Kind::Short => rest.short().map(|text| {
                clean &= std::str::from_utf8(text).is_ok();
                let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
                std::iter::once(length).chain(spelled(text)).collect()
            }),
            Kind::Octet => rest.take(1).map(<[u8]>::to_vec),
            Kind::Long | Kind::Table => rest.take(8).map(<[u8]>::to_vec),
        };
        let Some(field) = field else {
            clean = false;
            break;
        };
        present |= flag;
        fields.push(field);
    }
    if clean && rest.rest().is_empty() {
        return None;
    }

    let others = FIXED + fields.iter().map(Vec::len).sum::<usize>();
    let listed = (limit / 4).min(4096);
    fit(&mut entries, &mut removed, limit.saturating_sub(others + 4), listed);
    let mut table: Vec<u8> = entries.iter().flat_map(|entry| entry.raw).copied().collect();
    table.extend(listing(&removed, listed));

    let before = fields.len().min((present & 0xC000u16).count_ones() as usize);
    let mut header = fixed[..12].to_vec();
    header.extend((present | 1 << (15 - HEADERS)).to_be_bytes());
    header.extend(fields[..before].iter().flatten());
    header.extend(length(table.len()));
    header.extend(table);
    header.extend(fields[before..].iter().flatten());
    Some((header, removed))
}

/// Finds the entries that can be read. False when there are others.
fn sort<'a>(table: &'a [u8], entries: &mut Vec<Entry<'a>>, removed: &mut Removed) -> bool {
    let before = removed.entries.len();
    let mut rest = Reader::new(table);
    while !rest.rest().is_empty() {
        let start = rest.rest();
        let Some(name) = rest.short() else {
            removed.add("…".as_bytes(), Fault::Unreadable);
            break;
        };
        let (fault, ended) = match value(&mut rest, DEPTH) {
            Ok(()) => (std::str::from_utf8(name).is_err().then_some(Fault::Unreadable), false),
            Err(Bad::Within(fault)) => (Some(fault), false),
            // How long it is, is not known.
            Err(Bad::Beyond) => (Some(Fault::Unreadable), true),
        };
        let raw = &start[..start.len() - rest.rest().len()];
        match fault {
            Some(fault) => removed.add(name, fault),
            // It would be taken for one of ours.
            None if name == REMOVED.as_bytes() => removed.add(name, Fault::Unreadable),
            None => entries.push(Entry { name, raw }),
        }
        if ended {
            break;
        }
    }
    removed.entries.len() == before
}

/// Why a value cannot be taken: with the end of it known, or not.
enum Bad {
    Within(Fault),
    Beyond,
}

/// Passes one value with its type. The depth is bounded, so this recursion is.
fn value(rest: &mut Reader<'_>, depth: usize) -> Result<(), Bad> {
    let kind = rest.take(1).ok_or(Bad::Beyond)?[0];
    let length = match kind {
        b'V' => 0,
        b't' | b'b' | b'B' => 1,
        b's' | b'U' | b'u' => 2,
        b'I' | b'i' | b'f' => 4,
        b'D' => 5,
        b'L' | b'l' | b'd' | b'T' => 8,
        b'S' | b'x' => return rest.long().map(drop).ok_or(Bad::Beyond),
        b'A' | b'F' => {
            let mut within = Reader::new(rest.long().ok_or(Bad::Beyond)?);
            if depth == 0 {
                return Err(Bad::Within(Fault::Deep));
            }
            while !within.rest().is_empty() {
                if kind == b'F' && within.short().is_none_or(|name| std::str::from_utf8(name).is_err()) {
                    return Err(Bad::Within(Fault::Unreadable));
                }
                value(&mut within, depth - 1).map_err(|bad| match bad {
                    Bad::Within(fault) => Bad::Within(fault),
                    Bad::Beyond => Bad::Within(Fault::Unreadable),
                })?;
            }
            return Ok(());
        }
        _ => return Err(Bad::Beyond),
    };
    rest.take(length).map(drop).ok_or(Bad::Beyond)
}

/// Removes what the broker added, and then the largest, until the rest has at most `room` bytes with the entry that
/// says what was removed, which has at most `listed`.
fn fit(entries: &mut Vec<Entry<'_>>, removed: &mut Removed, room: usize, listed: usize) {
    let mut bytes: usize = entries.iter().map(|entry| entry.raw.len()).sum();
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&n| (entries[n].name == DEATHS, entries[n].raw.len()));
    let mut gone = BTreeSet::new();
    while bytes + listing(removed, listed).len() > room {
        let Some(largest) = order.pop() else { break };
        let entry = &entries[largest];
        bytes -= entry.raw.len();
        removed.add(entry.name, Fault::Large(entry.raw.len()));
        gone.insert(largest);
    }
    let mut n = 0..;
    entries.retain(|_| n.next().is_none_or(|n| !gone.contains(&n)));
}

/// The entry that says what was removed, if anything was, in at most `room` bytes.
fn listing(removed: &Removed, room: usize) -> Vec<u8> {
    if removed.is_empty() {
        return Vec::new();
    }
    let mut table = Vec::new();
    let overhead = 1 + REMOVED.len() + 1 + 4;
    for (name, fault) in removed.entries.iter().take(LISTED) {
        let name: Vec<u8> = name.bytes().take(255).collect();
        let name = name.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        let reason = fault.to_string();
        if overhead + table.len() + 1 + name.len() + 5 + reason.len() > room {
            break;
        }
        table.push(u8::try_from(name.len()).unwrap_or(0));
        table.extend(name.bytes());
        table.push(b'S');
        table.extend(length(reason.len()));
        table.extend(reason.bytes());
    }
    let mut entry = vec![u8::try_from(REMOVED.len()).unwrap_or(0)];
    entry.extend(REMOVED.bytes());
    entry.push(b'F');
    entry.extend(length(table.len()));
    entry.extend(table);
    entry
}

/// A text as it can be read: as long as it was, with `?` for each byte that is not UTF-8.
pub(crate) fn spelled(text: &[u8]) -> Vec<u8> {
    let mut spelled = Vec::with_capacity(text.len());
    for chunk in text.utf8_chunks() {
        spelled.extend(chunk.valid().bytes());
        spelled.extend(std::iter::repeat_n(b'?', chunk.invalid().len()));
    }
    spelled
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

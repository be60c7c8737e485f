//! What `/proc` tells about processes: whose child one is, and whose mark it carries.

use std::{collections::HashMap, fs};

use rustix::process::{Pid, Signal};

/// The variable that every process of a stack inherits. Its value names the stack, after those of the
/// stacks around it, so that whoever cleans up finds all of them and nobody else's.
pub const MARK: &str = "DEVSTACK_MARK";

/// `pid`'s children, their children and so on; parents come first.
pub fn descendants(pid: Pid) -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<Pid>> = HashMap::new();
    for (child, parent) in alive().filter_map(|pid| Some((pid, parent(pid)?))) {
        children.entry(parent).or_default().push(child);
    }
    let mut found = children.remove(&pid.as_raw_nonzero().get()).unwrap_or_default();
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children.remove(&pid.as_raw_nonzero().get()).unwrap_or_default());
        next += 1;
    }
    found
}

/// `pid`'s children, without theirs.
pub fn children(pid: Pid) -> Vec<Pid> {
    alive().filter(|child| parent(*child) == Some(pid.as_raw_nonzero().get())).collect()
}

/// Processor time that a process, and its children that have ended, have taken, in the kernel's ticks.
pub fn processor(pid: Pid) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name: its own in the program and in the kernel, and its children's.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split(' ');
    fields.skip(11).take(4).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// The processes that carry `mark`.
pub fn marked(mark: &str) -> Vec<Pid> {
    let carries = |pid: &Pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| {
            str::from_utf8(variable)
                .ok()
                .and_then(|variable| variable.strip_prefix(MARK)?.strip_prefix('='))
                .is_some_and(|value| value.split('/').any(|part| part == mark))
        })
    };
    alive().filter(carries).collect()
}

/// Whether `pid` still runs. A zombie does not: it only waits for its parent to notice.
pub fn runs(pid: Pid) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

/// Sends `signal` to each; a process that has just ended needs none.
pub fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        let _gone = rustix::process::kill_process(*pid, signal);
    }
}

fn alive() -> impl Iterator<Item = Pid> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
        .filter(|pid| runs(*pid))
}

fn parent(pid: Pid) -> Option<i32> {
    stat(pid).map(|(_, parent)| parent)
}

/// State and parent. The name in between is in parentheses and may contain anything.
fn stat(pid: Pid) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

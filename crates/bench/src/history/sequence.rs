//! What is done with a history, in order: first what only looks, then what changes it.

use anyhow::ensure;

use super::operation::{
    Count, Operation,
    Reach::{OfRelay, Rate, Still, Time, TimePerPartition},
};

const fn steady(line: &'static str) -> Operation {
    Operation::steady(line)
}

const fn linear(line: &'static str) -> Operation {
    Operation::linear(line)
}

const fn part(line: &'static str, of: f64) -> Operation {
    Operation::part(line, of)
}

const fn at_most(line: &'static str, buffers: f64) -> Operation {
    Operation::at_most(line, buffers)
}

const fn for_each_row(line: &'static str, buffers: f64) -> Operation {
    Operation::for_each_row(line, buffers)
}

/// What only looks, and what changes little.
pub(super) const LOOK: &[Operation] = &[
    steady("person-api migrate"),
    steady("outbox-relay migrate --source person"),
    steady("score-projector migrate"),
    steady("person-api health"),
    steady("score-api health"),
    steady("score-projector health"),
    steady("outbox-relay health"),
    steady("outbox-relay status"),
    steady("outbox-relay status").on_score(),
    // It looks at the last 10,000 events.
    at_most("outbox-relay doctor", 60_000.0),
    at_most("outbox-relay doctor", 60_000.0).on_score(),
    steady("outbox-relay trace {event}"),
    steady("outbox-relay trace person/{ordinary}"),
    steady("outbox-relay trace person/{giant}"),
    // Three rows an event: the event by the aggregate's index, and its progress with each of two relays. That is a block for
    // the event, three for the levels of the position's index, one for the relays, and one each for what is set aside: 2.3
    // a row. Looking for each position in each partition would be 7 a row at one million.
    for_each_row("outbox-relay trace person/{giant} --limit 10000", 3.0),
    steady("outbox-relay erasures"),
    steady("outbox-relay erasures --finish"),
    steady("outbox-relay forget unused --yes"),
    linear("outbox-relay recover"),
    linear("outbox-relay recover --sequence"),
    steady("outbox-relay pause"),
    steady("outbox-relay resume"),
    linear("outbox-relay digest"),
    linear("outbox-relay digest --consumer score").reach(Time(60.0)),
    part("outbox-relay replay --aggregate person/{ordinary} --dry-run", 0.01).reach(Time(0.1)),
    part("outbox-relay replay --aggregate person/{large} --dry-run", 0.02).reach(Time(1.0)),
    part("outbox-relay replay --aggregate person/{giant} --dry-run", 0.3).reach(Time(10.0)),
    // It may read the whole of the newest partition, one of eleven: of a short one, the writers fill a large part.
    part("outbox-relay replay --since {since} --dry-run", 0.12).reach(Time(2.0)),
    linear("outbox-relay replay --all --dry-run").reach(Time(10.0)),
    for_each_row("outbox-relay replay --from {from} --to {to} --to-queue history --rate 100000 --yes", 1.0)
        .reach(OfRelay(0.5))
        .counted(Count::Messages),
    linear("outbox-relay backfill contract --dry-run"),
    linear("outbox-relay backfill contract --to-queue history --rate 100000"),
    linear("outbox-relay prune --keep 30d --dry-run").reach(TimePerPartition(5.0)),
    linear("person-api republish --all --dry-run"),
    steady("person-api republish --person {ordinary}"),
    linear("person-api republish --person {giant}"),
    linear("person-api republish --all --rate 100000")
        .reach(Rate(2_000.0))
        .counted(Count::Rows("SELECT coalesce(sum(persons), 0)::bigint FROM person.republish"))
        .sampled(),
    linear("score-projector digest"),
    linear("score-projector digest --shadow"),
    linear("score-projector verify").reach(Time(60.0)),
    steady("score-projector republish --person {ordinary}"),
    linear("score-projector republish --all --rate 100000")
        .counted(Count::Rows("SELECT last_value FROM outbox.position"))
        .sampled(),
    steady("score-projector held list"),
    steady("score-projector rejected list"),
];

/// What clients send, to a person with 10 events, with a 2000th of the scale, and with a hundredth of it.
pub(super) const REQUESTS: &[Operation] = &[
    steady("GET person-api/person/{ordinary.cpf}"),
    // At most 1,000 items of each kind.
    at_most("GET person-api/person/{large.cpf}", 5_000.0),
    at_most("GET person-api/person/{giant.cpf}", 5_000.0),
    steady("GET person-api/person/{giant.cpf}/income?limit=100"),
    steady("GET person-api/person/{giant.cpf}/income?limit=100&after={item}"),
    steady("GET person-api/person/{giant.cpf}/income/{item}"),
    steady(r#"POST person-api/person {"cpf":99999999999,"name":"abc","date_of_birth":"1980-05-17"}"#),
    steady(r#"POST person-api/person/{giant.cpf}/income {"type":"renting","value":1000}"#),
    steady(r#"POST person-api/person/{giant.cpf}/asset {"type":"apartment","value":1000}"#),
    steady(r#"POST person-api/person/{giant.cpf}/debt {"value":1000}"#),
    steady(r#"PATCH person-api/person/{giant.cpf} {"name":"abd"}"#),
    steady(r#"PUT person-api/person/{giant.cpf}/income/{item} {"type":"renting","value":1001}"#),
    steady("DELETE person-api/person/{giant.cpf}/income/{item}"),
    steady("GET score-api/{ordinary.cpf}/score"),
    steady("GET score-api/{giant.cpf}/score"),
    steady("GET score-api/{giant.cpf}/score/entries?limit=100"),
    steady("GET score-api/{giant.cpf}/score/entries?limit=100&after_entry={item}"),
    steady("GET person-api/ready"),
    steady("GET person-api/metrics"),
    steady("GET score-api/ready"),
    steady("GET score-api/metrics"),
    steady("GET person-relay/ready"),
    steady("GET person-relay/metrics"),
    steady("GET score-projector/ready"),
    steady("GET score-projector/metrics"),
];

/// The rebuild of the read model, from when the shadow is as far as the live one.
pub(super) const REBUILD: &[Operation] = &[
    linear("score-projector rebuild status").reach(Time(2.0)),
    linear("score-projector rebuild swap --dry-run").reach(Still(1.0)),
    linear("score-projector rebuild swap").reach(Still(1.0)),
    linear("score-projector rebuild drop"),
];

/// With much held, as many parked, and some rejected.
pub(super) const SET_ASIDE: &[Operation] = &[
    // It counts what is set aside.
    linear("outbox-relay status"),
    linear("outbox-relay parked list"),
    steady("outbox-relay parked show {parked}"),
    linear("outbox-relay parked retry --all"),
    linear("outbox-relay parked drop --all --yes"),
    linear("score-projector held list"),
    steady("score-projector held show {held}"),
    steady("score-projector held skip --event {held} --why bench --yes"),
    linear("score-projector held redrive --all --dry-run").sampled(),
    linear("score-projector held redrive --all")
        .reach(Rate(2_000.0))
        .counted(Count::Rows("SELECT count(*) FROM inbox.held")),
    linear("score-projector rejected list"),
    linear("score-projector rejected drop --all --yes"),
];

/// The ends of persons.
pub(super) const DELETE: &[Operation] = &[
    steady("DELETE person-api/person/{ordinary.cpf}"),
    linear("DELETE person-api/person/{large.cpf}"),
    linear("DELETE person-api/person/{giant.cpf}").reach(Time(1.0)),
];

/// With a baseline of everybody above the history.
pub(super) const RETIRE: &[Operation] = &[
    linear("outbox-relay prune --keep 30d --dry-run").reach(TimePerPartition(5.0)),
    linear("outbox-relay prune --keep 30d"),
];

/// Commands that are not in any list, and why.
const LEFT_OUT: [(&str, &str); 4] = [
    ("run", "the programs run all the time"),
    ("completions", "it connects to nothing"),
    ("help", "it reads no database"),
    ("new-incarnation", "it changes what everything else is about"),
];

/// Fails when a program has a command that is neither measured nor left out for a reason.
pub(crate) fn every_command() -> anyhow::Result<()> {
    for program in ["outbox-relay", "person-api", "score-projector", "score-api"] {
        let help = std::process::Command::new(devstack::binary::find(program)?).arg("--help").output()?;
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        for command in commands(&help) {
            let start = format!("{program} {command}");
            let lists = [LOOK, REBUILD, SET_ASIDE, RETIRE].into_iter().flatten();
            let known = LEFT_OUT.iter().any(|(left_out, _)| *left_out == command)
                || lists.into_iter().any(|operation| operation.line.starts_with(&start));
            ensure!(known, "`{start}` is not measured: add it to crates/bench/src/history/sequence.rs");
        }
    }
    Ok(())
}

/// The commands that a program's help lists.
fn commands(help: &str) -> impl Iterator<Item = &str> {
    let list = help.split_once("Commands:\n").map_or("", |(_, list)| list);
    let list = list.split_once("\n\n").map_or(list, |(list, _)| list);
    list.lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_help_lists_commands() {
        let help = "About\n\nCommands:\n  run      Relay\n           more words\n  status   Show\n\nOptions:\n  -h  Help\n";
        assert_eq!(super::commands(help).collect::<Vec<_>>(), ["run", "status"]);
    }
}

//! What `/metrics` says beside what the program has counted: each part of its health, and what the process takes.

use std::fmt::Write as _;

use super::State;

/// 1 while a part works, 0 while it waits.
const READY: (&str, &str) = ("health_ready", "1 while this part can do its work, 0 while it waits.");
/// 1 while a part has something for an operator.
const ATTENTION: (&str, &str) =
    ("health_attention", "1 while this part does its work and an operator should look at it, otherwise 0.");

/// A label as `/metrics` renders it.
pub(super) fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
    format!("{name}=\"{value}\"")
}

/// Describes and reads what the process takes: processor time, memory, files.
pub(super) fn of_the_process() {
    let process = metrics_process::Collector::default();
    process.describe();
    process.collect();
}

impl State {
    /// The rendered metrics without the series of what is gone, and with the parts of the health.
    pub(super) fn complete(&self, rendered: &str) -> String {
        let mut text: String =
            rendered.split_inclusive('\n').filter(|line| !self.is_of_something_gone(line)).collect();
        self.show(&mut text, READY, |waiting| waiting.is_none_or(|waiting| waiting.ready));
        self.show(&mut text, ATTENTION, |waiting| waiting.is_some_and(|waiting| waiting.ready));
        text
    }

    /// The labels of a series follow its first brace. A comment has none.
    fn is_of_something_gone(&self, line: &str) -> bool {
        let Some((_, labels)) = line.split_once('{').filter(|_| !line.starts_with('#')) else { return false };
        let labels = format!(",{labels}");
        let has = |label: &String| labels.contains(&format!(",{label}"));
        self.gone.iter().any(|gone| gone.iter().all(has))
    }

    fn show(
        &self,
        text: &mut String,
        (name, help): (&str, &str),
        is_one: impl Fn(Option<&super::Waiting>) -> bool,
    ) {
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n");
        for ((member, part), waiting) in &self.parts {
            let identity = match member {
                None => Some(&self.identity),
                Some(member) => self.identity.members.get(member),
            };
            let mut labels = identity.map(super::Identity::labels).unwrap_or_default();
            labels.extend(member.as_ref().map(|member| label(member.kind, &member.name)));
            labels.push(label("part", part));
            let value = u8::from(is_one(waiting.as_ref()));
            let _ = writeln!(text, "{name}{{{}}} {value}", labels.join(","));
        }
    }
}

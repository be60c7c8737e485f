//! The steps of a recovery, as they are shown.

use std::fmt::Write;

use serde::Serialize;

/// One step.
#[derive(Debug, Serialize)]
pub(super) struct Step {
    name: &'static str,
    done: bool,
    finding: String,
    /// What to do about it; none when it is done.
    next: Option<String>,
    /// Aggregates that it is about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    aggregates: Vec<String>,
}

impl Step {
    pub(super) fn done(name: &'static str, finding: impl Into<String>) -> Self {
        Self { name, done: true, finding: finding.into(), next: None, aggregates: Vec::new() }
    }

    pub(super) fn next(name: &'static str, finding: impl Into<String>, next: impl Into<String>) -> Self {
        let (finding, next) = (finding.into(), Some(next.into()));
        Self { name, done: false, finding, next, aggregates: Vec::new() }
    }

    /// With some of the aggregates that it is about.
    pub(super) fn naming(self, aggregates: Vec<String>) -> Self {
        Self { aggregates, ..self }
    }
}

/// All steps up to the first one that is not done.
#[derive(Debug, Default)]
pub(super) struct Steps(Vec<Step>);

impl Steps {
    pub(super) fn push(&mut self, step: Step) {
        self.0.push(step);
    }

    pub(super) fn extend(&mut self, steps: Vec<Step>) {
        self.0.extend(steps);
    }

    pub(super) fn is_finished(&self) -> bool {
        self.0.iter().all(|step| step.done)
    }

    pub(super) fn all(&self) -> &[Step] {
        &self.0
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for Step { name, done, finding, next, aggregates } in &self.0 {
            let state = if *done { "done" } else { "next" };
            let _ = writeln!(text, "{state}  {name}: {}", escape::line(finding));
            for aggregate in aggregates {
                let _ = writeln!(text, "        {}", escape::line(aggregate));
            }
            if let Some(next) = next {
                let _ = writeln!(text, "      -> {}", escape::line(next));
            }
        }
        if self.is_finished() {
            text.push_str("nothing is left to do\n");
        }
        text
    }
}

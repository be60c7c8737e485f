//! The last hour as pictures.

use std::fmt::Write as _;

use chrono::{TimeDelta, Utc};
use maud::{Markup, html};
use outbox_relay::command::span;

use crate::{
    page::raw,
    sample::{HOUR, Sample},
};

/// The size of the drawing; the page stretches it.
const SIZE: (f64, f64) = (360.0, 80.0);

/// What is drawn of a sample, and how its largest value reads.
type Curve = (&'static str, fn(&Sample) -> f64, fn(f64) -> String);

const CURVES: [Curve; 4] = [
    ("Events that are not settled", |sample| sample.backlog, |value| format!("{value:.0}")),
    ("Age of the oldest", |sample| sample.age, span),
    ("Published a second", |sample| sample.published, |value| format!("{value:.0}")),
    ("Set aside or waiting", |sample| sample.aside, |value| format!("{value:.0}")),
];

/// Four plots of the same hour.
pub fn hour(samples: &[Sample]) -> Markup {
    if samples.len() < 2 {
        return html! { p.dim { "The console has just begun to look." } };
    }
    let end = samples.last().map_or_else(Utc::now, |last| last.at);
    let seconds = HOUR.as_secs_f64();
    html! {
        div.plots {
            @for (name, value, text) in CURVES {
                @let most = samples.iter().map(value).fold(0.0, f64::max);
                @let last = samples.last().map_or(0.0, value);
                figure {
                    figcaption { (name) ": " (text(last)) " now, at most " (text(most)) }
                    svg viewBox={ "0 0 " (SIZE.0) " " (SIZE.1) } preserveAspectRatio="none" role="img" aria-label={ (name) " in the last hour: now " (text(last)) ", at most " (text(most)) } {
                        (raw(format!("<path class=\"frame\" d=\"M0 0V{0}H{1}\"/>", SIZE.1, SIZE.0)))
                        (raw(format!("<path class=\"curve\" d=\"{}\"/>", path(samples, |sample| {
                            let age = (end - sample.at).max(TimeDelta::zero()).as_seconds_f64();
                            (1.0 - age / seconds, if most > 0.0 { value(sample) / most } else { 0.0 })
                        }))))
                    }
                }
            }
        }
    }
}

/// A line through points whose coordinates are from 0 to 1.
fn path(samples: &[Sample], at: impl Fn(&Sample) -> (f64, f64)) -> String {
    let mut path = String::with_capacity(samples.len() * 12);
    for sample in samples {
        let (x, y) = at(sample);
        let step = if path.is_empty() { 'M' } else { 'L' };
        let _never = write!(path, "{step}{:.1} {:.1}", x * SIZE.0, (1.0 - y) * (SIZE.1 - 2.0) + 1.0);
    }
    path
}

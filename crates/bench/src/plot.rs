//! Plots as SVG, readable on light and on dark pages.

use std::fmt::Write;

use super::{
    figure::Measured,
    report::Report,
    statistics::{Spread, float, number},
};

const WIDTH: f64 = 860.0;
const STYLE: &str = "<style>text{font:13px sans-serif;fill:#808080}.name{font-weight:bold}\
.system{fill:#2a7ab8}.ceiling{fill:#b0b0b0}.missed{fill:#c8553d}.goal{stroke:#808080;stroke-width:2}\
.range{stroke:#2a7ab8;stroke-width:2}.range.missed{stroke:#c8553d}.axis{stroke:#808080;stroke-width:0.5}</style>";

fn svg(height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">\n{STYLE}\n{body}</svg>\n"
    )
}

/// How far each goal is met: each median with its least and most, as parts of the goal.
pub(crate) fn goals(report: &Report) -> String {
    const ROW: f64 = 40.0;
    const LEFT: f64 = 170.0;
    const RIGHT: f64 = 40.0;
    let parts = |measured: &Measured| {
        let limit = measured.row.goal.limit();
        let Spread { median, min, max } = Spread::of(&measured.values());
        [min / limit, median / limit, max / limit]
    };
    let most = report.rows.iter().map(|row| parts(row)[2]).fold(1.2, f64::max).min(4.0);
    let x = |part: f64| LEFT + part.clamp(0.0, most) / most * (WIDTH - LEFT - RIGHT);
    let mut body = String::new();
    for (n, measured) in report.rows.iter().enumerate() {
        let y = ROW * float(i64::try_from(n).unwrap_or(0)) + 30.0;
        let [min, median, max] = parts(measured);
        let missed = if measured.is_met() { "" } else { " missed" };
        let _never = writeln!(
            body,
            "<text class=\"name\" x=\"0\" y=\"{text_y}\">{name}</text>\
             <line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y}\" y2=\"{y}\"/>\
             <line class=\"range{missed}\" x1=\"{x_min:.1}\" x2=\"{x_max:.1}\" y1=\"{y}\" y2=\"{y}\"/>\
             <circle class=\"system{missed}\" cx=\"{x_median:.1}\" cy=\"{y}\" r=\"5\"/>\
             <text x=\"{x_median:.1}\" y=\"{above}\" text-anchor=\"middle\">{value}</text>",
            text_y = y + 4.0,
            name = measured.row.name,
            right = WIDTH - RIGHT,
            x_min = x(min),
            x_max = x(max),
            x_median = x(median),
            above = y - 9.0,
            value = number(Spread::of(&measured.values()).median),
        );
        let _never = writeln!(
            body,
            "<line class=\"goal\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{y1}\" y2=\"{y2}\"/>\
             <text x=\"{x:.1}\" y=\"{text_y}\" text-anchor=\"middle\" font-size=\"11\">{goal}</text>",
            x = x(1.0),
            y1 = y - 8.0,
            y2 = y + 8.0,
            text_y = y + 21.0,
            goal = measured.row.goal,
        );
    }
    svg(ROW * float(i64::try_from(report.rows.len()).unwrap_or(0)) + 30.0, &body)
}

/// Every round of the system and of its ceiling, a panel for each row that has one.
pub(crate) fn rounds(report: &Report) -> String {
    const PANEL: f64 = 150.0;
    const LEFT: f64 = 170.0;
    const HIGH: f64 = 100.0;
    let panels: Vec<&Measured> = report.rows.iter().filter(|row| row.row.ceiling.is_some()).collect();
    let mut body = String::new();
    for (n, measured) in panels.iter().enumerate() {
        let top = PANEL * float(i64::try_from(n).unwrap_or(0)) + 20.0;
        let all = measured.of_system.iter().chain(&measured.of_ceiling);
        let most = all.copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let _never = writeln!(
            body,
            "<text class=\"name\" x=\"0\" y=\"{y1}\">{name}</text><text x=\"0\" y=\"{y2}\">{unit}</text>\
             <line class=\"axis\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{bottom}\" y2=\"{bottom}\"/>",
            y1 = top + 15.0,
            y2 = top + 33.0,
            name = measured.row.name,
            unit = measured.row.unit,
            bottom = top + HIGH,
        );
        let wide = (WIDTH - LEFT) / float(i64::try_from(measured.of_system.len().max(1)).unwrap_or(1));
        for (round, pair) in measured.of_system.iter().zip(&measured.of_ceiling).enumerate() {
            let left = LEFT + wide * float(i64::try_from(round).unwrap_or(0));
            for (class, at, value) in [("system", 0.1, *pair.0), ("ceiling", 0.5, *pair.1)] {
                let high = value / most * (HIGH - 15.0);
                let _never = writeln!(
                    body,
                    "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{high:.1}\"/>\
                     <text x=\"{middle:.1}\" y=\"{text_y:.1}\" text-anchor=\"middle\">{value}</text>",
                    x = left + wide * at,
                    y = top + HIGH - high,
                    w = wide * 0.38,
                    middle = left + wide * (at + 0.19),
                    text_y = top + HIGH - high - 3.0,
                    value = number(value),
                );
            }
        }
    }
    let height = PANEL * float(i64::try_from(panels.len()).unwrap_or(0)) + 20.0;
    let _never = writeln!(
        body,
        "<rect class=\"system\" x=\"{LEFT}\" y=\"{y}\" width=\"12\" height=\"12\"/><text x=\"{x1}\" y=\"{t}\">the system</text>\
         <rect class=\"ceiling\" x=\"{x2}\" y=\"{y}\" width=\"12\" height=\"12\"/><text x=\"{x3}\" y=\"{t}\">its ceiling, or floor</text>",
        y = height - 16.0,
        t = height - 5.0,
        x1 = LEFT + 18.0,
        x2 = LEFT + 120.0,
        x3 = LEFT + 138.0,
    );
    svg(height, &body)
}

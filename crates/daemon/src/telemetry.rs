//! Logs to standard error: for people at a terminal, JSON otherwise. Metrics for Prometheus.

use std::io::IsTerminal;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    field::MakeExt,
    filter::{ParseError, filter_fn},
    fmt::{
        self, FmtContext, FormatEvent, FormatFields,
        format::{JsonFields, Writer, debug_fn},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::config::SettingError;

/// How a program logs.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people at a terminal, JSON otherwise.
    #[default]
    Auto,
    /// One readable line an event.
    Human,
    /// One JSON object an event.
    Json,
}

/// What and how to log.
#[derive(Clone, Debug, clap::Args)]
pub struct TelemetryArgs {
    /// What to log: a level, or directives such as `info,outbox_relay=debug`.
    #[arg(long, env = "LOG", default_value = "info", value_name = "DIRECTIVES")]
    pub log: String,
    /// How to log; `auto` is `human` at a terminal and `json` elsewhere.
    #[arg(long, env = "LOG_FORMAT", default_value = "auto", value_enum, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// What may be logged whatever `LOG` says; a directive could be overruled by a more specific one. lapin
/// writes returned messages out in full, bodies with personal data included, and its frames below info;
/// sqlx reports notices such as "already exists, skipping".
fn may_be_logged(metadata: &Metadata<'_>) -> bool {
    let (target, level) = (metadata.target(), *metadata.level());
    if target == "lapin::returned_messages" {
        false
    } else if target.starts_with("lapin") || target.starts_with("amq_protocol") {
        level <= Level::INFO
    } else if target.starts_with("sqlx::postgres::notice") {
        level <= Level::WARN
    } else {
        true
    }
}

/// What `LOG` says, without lapin unless it is named: lapin logs each connection that ends as an error, several times. The
/// code that held the connection logs what it means.
fn filter(log: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(format!("lapin=off,{log}"))
}

/// The message and the fields of an event in one line, whatever stands in them: a line break in an aggregate's id
/// would forge a line of the log. (As JSON, strings are escaped in any case.)
fn safe_fields() -> impl for<'a> FormatFields<'a> + 'static {
    let fields = debug_fn(|to, field, value| {
        let value = format!("{value:?}");
        match field.name() {
            "message" => write!(to, "{}", escape::line(&value)),
            name => write!(to, "{name}={}", escape::line(&value)),
        }
    });
    fields.delimited(" ")
}

/// A line with the trace and the span in which it was written, if there is one: `trace_id` and `span_id`.
struct InTrace<F> {
    inner: F,
    json: bool,
}

impl<S, N, F> FormatEvent<S, N> for InTrace<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        // A line that names its own trace stays as it is.
        let named = || event.metadata().fields().field("trace_id").is_some();
        let Some((trace, span)) = trace().filter(|_| !named()) else {
            return self.inner.format_event(context, to, event);
        };
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        let line = line.trim_end();
        match line.strip_suffix('}').filter(|_| self.json) {
            Some(object) => writeln!(to, "{object},\"trace_id\":\"{trace}\",\"span_id\":\"{span}\"}}"),
            None => writeln!(to, "{line} trace_id={trace} span_id={span}"),
        }
    }
}

/// The trace and the span of the current context.
#[cfg(feature = "otlp")]
fn trace() -> Option<(String, String)> {
    crate::traces::current()
}

/// None: without the feature `otlp` there are no traces.
#[cfg(not(feature = "otlp"))]
fn trace() -> Option<(String, String)> {
    None
}

/// Starts logging and metrics for the whole process; call once. The handle renders the metrics.
pub fn start(args: &TelemetryArgs) -> Result<PrometheusHandle, SettingError> {
    let filter = filter(&args.log).map_err(|e| {
        SettingError::new("LOG", format_args!("{e}; it should look like info, or info,outbox_relay=debug"))
    })?;
    let json = match args.log_format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let registry = tracing_subscriber::registry().with(filter).with(filter_fn(may_be_logged));
    let layer = fmt::layer().with_writer(std::io::stderr);
    let started = if json {
        let inner = fmt::format().json().flatten_event(true);
        let layer = layer.fmt_fields(JsonFields::new()).event_format(InTrace { inner, json });
        registry.with(layer).try_init()
    } else {
        let colours = std::io::stderr().is_terminal();
        let inner = fmt::format().with_target(false).with_ansi(colours);
        let layer = layer.with_ansi(colours).fmt_fields(safe_fields());
        registry.with(layer.event_format(InTrace { inner, json })).try_init()
    };
    started.map_err(|e| SettingError::new("LOG", format_args!("logging was started already: {e}")))?;
    // Where, and never what it says: that may quote what was sent.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panicked");
    }));
    // Seconds, from a fast confirm to a very slow one.
    PrometheusBuilder::new()
        .set_buckets_for_metric(
            Matcher::Suffix("_seconds".to_owned()),
            &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0],
        )
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|e| SettingError::new("metrics", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is logged when `LOG` says this, the most specific first.
    fn directives(log: &str) -> String {
        filter(log).unwrap().to_string()
    }

    #[test]
    fn lapin_is_silent_unless_it_is_named() {
        assert_eq!(directives("info"), "lapin=off,info");
        assert_eq!(directives("info,lapin=info"), "lapin=info,info");
        assert!(filter("info,lapin=loud").is_err() && filter("info,outbox=loud").is_err());
    }

    /// What a line looks like, as JSON or as text, without its time.
    #[cfg(feature = "otlp")]
    fn line(json: bool, log: impl FnOnce()) -> String {
        use std::sync::{Arc, Mutex};

        use tracing_subscriber::fmt::MakeWriter;

        #[derive(Clone, Default)]
        struct Kept(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Kept {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        impl<'a> MakeWriter<'a> for Kept {
            type Writer = Self;
            fn make_writer(&'a self) -> Self {
                self.clone()
            }
        }
        let kept = Kept::default();
        let layer = fmt::layer().with_writer(kept.clone());
        let registry = tracing_subscriber::registry();
        let format = fmt::format().without_time().with_target(false);
        if json {
            let inner = format.json().flatten_event(true);
            let layer = layer.fmt_fields(JsonFields::new()).event_format(InTrace { inner, json });
            tracing::subscriber::with_default(registry.with(layer), log);
        } else {
            let layer = layer.fmt_fields(safe_fields()).with_ansi(false);
            let layer = layer.event_format(InTrace { inner: format.with_ansi(false), json });
            tracing::subscriber::with_default(registry.with(layer), log);
        }
        let bytes = kept.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[cfg(feature = "otlp")]
    #[test]
    fn a_line_names_the_trace_in_which_it_was_written() {
        use opentelemetry::{Context, trace::TraceContextExt};

        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        let context = Context::new().with_remote_span_context(outbox::trace::remote(text).unwrap());
        let inside = |json: bool, log: fn()| {
            line(json, || {
                let _inside = context.clone().attach();
                log();
            })
        };
        let plain: fn() = || tracing::info!(part = "a}", "waiting");
        let named: fn() = || tracing::info!(trace_id = "its own", "listening");
        let lines = [
            inside(true, plain),
            inside(false, plain),
            inside(true, named),
            inside(false, named),
            line(true, plain),
            line(false, plain),
        ];
        insta::assert_snapshot!(lines.concat());
    }
}

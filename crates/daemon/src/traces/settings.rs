//! OpenTelemetry's own variables. A value that cannot be used ends the program, with the variable's name and an example.

use std::{fmt, str::FromStr, time::Duration};

use opentelemetry_sdk::trace::Sampler;
use url::Url;

use crate::config::SettingError;

const DISABLED: &str = "OTEL_SDK_DISABLED";
const EXPORTER: &str = "OTEL_TRACES_EXPORTER";
const PROPAGATORS: &str = "OTEL_PROPAGATORS";
const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";
const SERVICE_NAME: &str = "OTEL_SERVICE_NAME";
const RESOURCE_ATTRIBUTES: &str = "OTEL_RESOURCE_ATTRIBUTES";
/// The exporter's, as `OTEL_EXPORTER_OTLP_…` for every signal, and as `OTEL_EXPORTER_OTLP_TRACES_…` for traces alone.
const ENDPOINT: &str = "ENDPOINT";
const PROTOCOL: &str = "PROTOCOL";
const TIMEOUT: &str = "TIMEOUT";
const HEADERS: &str = "HEADERS";
const COMPRESSION: &str = "COMPRESSION";

/// How spans travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Grpc,
    HttpProtobuf,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grpc => "grpc",
            Self::HttpProtobuf => "http/protobuf",
        })
    }
}

/// What and where to export.
#[derive(Debug)]
pub(super) struct Settings {
    /// With its path, for HTTP.
    pub(super) endpoint: Url,
    pub(super) protocol: Protocol,
    /// Of one export.
    pub(super) timeout: Duration,
    pub(super) sampler: Sampler,
    /// Whether the sampler follows a parent.
    pub(super) parent_based: bool,
    pub(super) service: String,
    pub(super) attributes: Vec<(String, String)>,
    /// Whether traces go on from other programs.
    pub(super) propagate: bool,
    /// How many spans wait in memory at most.
    pub(super) queue: usize,
    /// How many of them are sent together at most, and how long they wait for others.
    pub(super) batch: usize,
    pub(super) delay: Duration,
}

/// The value of a variable. One that is empty counts as not set.
type Lookup<'a> = &'a dyn Fn(&str) -> Result<Option<String>, SettingError>;

/// Reads a variable of the environment.
pub(super) fn environment(name: &str) -> Result<Option<String>, SettingError> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value.trim().to_owned()).filter(|value| !value.is_empty())),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(SettingError::new(name, "is not UTF-8")),
    }
}

impl Settings {
    /// None where no endpoint is set, or traces are switched off. `program` is the name of the service unless a variable
    /// says another one.
    pub(super) fn read(program: &str, lookup: Lookup<'_>) -> Result<Option<Self>, SettingError> {
        let disabled = match lookup(DISABLED)?.map(|value| value.to_ascii_lowercase()).as_deref() {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => return Err(wrong(DISABLED, "true or false")),
        };
        let exporter = match lookup(EXPORTER)?.as_deref() {
            None | Some("otlp") => true,
            Some("none") => false,
            Some(_) => return Err(wrong(EXPORTER, "otlp or none")),
        };
        let Some((name, endpoint, with_path)) = endpoint(lookup)?.filter(|_| !disabled && exporter) else {
            return Ok(None);
        };
        let protocol = protocol(lookup)?;
        let endpoint = url(&name, &endpoint, protocol, with_path)?;
        headers(lookup)?;
        if let Some((name, _)) = signal(lookup, COMPRESSION)?.filter(|(_, value)| value != "none") {
            return Err(wrong(&name, "none: spans are not compressed"));
        }
        let timeout = match signal(lookup, TIMEOUT)? {
            None => Duration::from_secs(10),
            Some((name, text)) => milliseconds(&name, &text, "10000")?,
        };
        let (sampler, parent_based) = sampler(lookup)?;
        let attributes = attributes(lookup)?;
        let named =
            attributes.iter().find(|(name, _)| name == "service.name").map(|(_, value)| value.clone());
        let service = lookup(SERVICE_NAME)?.or(named).unwrap_or_else(|| program.to_owned());
        let queue = number(lookup, "OTEL_BSP_MAX_QUEUE_SIZE", 2048, 65_536)?;
        let batch = number(lookup, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512.min(queue), queue)?;
        let delay = match lookup("OTEL_BSP_SCHEDULE_DELAY")? {
            None => Duration::from_secs(5),
            Some(text) => milliseconds("OTEL_BSP_SCHEDULE_DELAY", &text, "5000")?,
        };
        let propagate = propagates(lookup)?;
        Ok(Some(Self {
            endpoint,
            protocol,
            timeout,
            sampler,
            parent_based,
            service,
            attributes,
            propagate,
            queue,
            batch,
            delay,
        }))
    }

    /// The endpoint without a path or a password, for the log.
    pub(super) fn address(&self) -> String {
        let port = self.endpoint.port_or_known_default().unwrap_or_default();
        format!("{}://{}:{port}", self.endpoint.scheme(), self.endpoint.host_str().unwrap_or_default())
    }
}

fn wrong(name: &str, form: &str) -> SettingError {
    SettingError::new(name, format_args!("should be {form}"))
}

/// The variable for traces alone, or else the one for all signals, with its name.
fn signal(lookup: Lookup<'_>, name: &str) -> Result<Option<(String, String)>, SettingError> {
    for name in [format!("OTEL_EXPORTER_OTLP_TRACES_{name}"), format!("OTEL_EXPORTER_OTLP_{name}")] {
        if let Some(value) = lookup(&name)? {
            return Ok(Some((name, value)));
        }
    }
    Ok(None)
}

/// The endpoint, with its variable, and whether it has the path of traces already.
fn endpoint(lookup: Lookup<'_>) -> Result<Option<(String, String, bool)>, SettingError> {
    let endpoint = signal(lookup, ENDPOINT)?;
    Ok(endpoint.map(|(name, value)| {
        let with_path = name.contains("_TRACES_");
        (name, value, with_path)
    }))
}

fn protocol(lookup: Lookup<'_>) -> Result<Protocol, SettingError> {
    match signal(lookup, PROTOCOL)? {
        None => Ok(Protocol::HttpProtobuf),
        Some((name, value)) => match value.as_str() {
            "grpc" => Ok(Protocol::Grpc),
            "http/protobuf" => Ok(Protocol::HttpProtobuf),
            _ => Err(wrong(&name, "http/protobuf or grpc")),
        },
    }
}

/// The URL may have a password, so that no error quotes it.
fn url(name: &str, text: &str, protocol: Protocol, with_path: bool) -> Result<Url, SettingError> {
    let example = match protocol {
        Protocol::Grpc => "a URL such as http://localhost:4317",
        Protocol::HttpProtobuf if with_path => "a URL such as http://localhost:4318/v1/traces",
        Protocol::HttpProtobuf => "a URL such as http://localhost:4318",
    };
    let url = Url::parse(text).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.fragment().is_none()
    });
    let mut url = url.ok_or_else(|| wrong(name, example))?;
    if protocol == Protocol::HttpProtobuf && !with_path {
        let path = format!("{}/v1/traces", url.path().trim_end_matches('/'));
        url.set_path(&path);
    }
    Ok(url)
}

/// Checks the headers, which the exporter reads by itself. Their values are secrets, so that no error quotes them.
fn headers(lookup: Lookup<'_>) -> Result<(), SettingError> {
    let Some((name, text)) = signal(lookup, HEADERS)? else { return Ok(()) };
    let token = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$&'*+-.^_`|~".contains(&b))
    };
    let sane = list(&text).all(|pair| {
        let value = |value: &str| decoded(value).is_some_and(|v| v.bytes().all(|b| matches!(b, b' '..=b'~')));
        pair.is_some_and(|(name, text)| token(name) && value(text))
    });
    if sane { Ok(()) } else { Err(wrong(&name, "a list such as authorization=Bearer%20KEY,tenant=north")) }
}

fn attributes(lookup: Lookup<'_>) -> Result<Vec<(String, String)>, SettingError> {
    let text = lookup(RESOURCE_ATTRIBUTES)?.unwrap_or_default();
    let pair = |pair: Option<(&str, &str)>| {
        let (name, value) = pair.filter(|(name, _)| !name.is_empty())?;
        Some((name.to_owned(), decoded(value)?))
    };
    let attributes: Option<Vec<_>> = list(&text).map(pair).collect();
    let form = "a list such as deployment.environment.name=production,service.namespace=shop";
    attributes.ok_or_else(|| wrong(RESOURCE_ATTRIBUTES, form))
}

/// The pairs of a list `name=value,name=value`; none for one without `=`.
fn list(text: &str) -> impl Iterator<Item = Option<(&str, &str)>> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').map(|(name, value)| (name.trim(), value.trim())))
}

/// Without percent encoding; none where it is wrong.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

fn sampler(lookup: Lookup<'_>) -> Result<(Sampler, bool), SettingError> {
    let name = lookup(SAMPLER)?;
    let name = name.as_deref().unwrap_or("parentbased_always_on");
    let (root, parent_based) = match name.strip_prefix("parentbased_") {
        Some(root) => (root, true),
        None => (name, false),
    };
    let root = match root {
        "always_on" => Sampler::AlwaysOn,
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => Sampler::TraceIdRatioBased(match lookup(SAMPLER_ARG)? {
            None => 1.0,
            Some(text) => {
                let ratio = f64::from_str(&text).ok().filter(|ratio| (0.0..=1.0).contains(ratio));
                ratio.ok_or_else(|| wrong(SAMPLER_ARG, "a ratio from 0 to 1, such as 0.01"))?
            }
        }),
        _ => {
            let form = "always_on, always_off or traceidratio, or one of them after parentbased_, such as \
                        parentbased_traceidratio";
            return Err(wrong(SAMPLER, form));
        }
    };
    let sampler = if parent_based { Sampler::ParentBased(Box::new(root)) } else { root };
    Ok((sampler, parent_based))
}

/// Whether `traceparent` is read and written. Baggage never is: nothing here needs it.
fn propagates(lookup: Lookup<'_>) -> Result<bool, SettingError> {
    let Some(text) = lookup(PROPAGATORS)? else { return Ok(true) };
    let names: Vec<&str> = text.split(',').map(str::trim).collect();
    if names.iter().any(|name| !matches!(*name, "tracecontext" | "baggage" | "none")) {
        return Err(wrong(PROPAGATORS, "tracecontext, tracecontext,baggage or none"));
    }
    Ok(names.contains(&"tracecontext"))
}

fn milliseconds(name: &str, text: &str, example: &str) -> Result<Duration, SettingError> {
    let wrong = || wrong(name, &format!("milliseconds, from 1 to 600000, such as {example}"));
    let milliseconds = text.parse().ok().filter(|ms| (1..=600_000).contains(ms));
    Ok(Duration::from_millis(milliseconds.ok_or_else(wrong)?))
}

fn number(lookup: Lookup<'_>, name: &str, default: usize, most: usize) -> Result<usize, SettingError> {
    let Some(text) = lookup(name)? else { return Ok(default) };
    let number = text.parse().ok().filter(|number| (1..=most).contains(number));
    number.ok_or_else(|| wrong(name, &format!("from 1 to {most}, such as {default}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The settings with these variables.
    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>, String> {
        let lookup = |name: &str| {
            Ok(variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
        };
        Settings::read("person-api", &lookup).map_err(|error| error.to_string())
    }

    /// With an endpoint.
    fn with(name: &str, value: &str) -> Result<Settings, String> {
        read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"), (name, value)]).map(Option::unwrap)
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");

    #[test]
    fn nothing_starts_without_an_endpoint_or_when_it_is_switched_off() {
        for variables in [
            &[][..],
            &[("OTEL_SERVICE_NAME", "x")],
            &[ENDPOINT, ("OTEL_SDK_DISABLED", "true")],
            &[ENDPOINT, ("OTEL_SDK_DISABLED", "TRUE")],
            &[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            assert!(read(variables).unwrap().is_none(), "{variables:?}");
        }
        assert!(read(&[ENDPOINT, ("OTEL_SDK_DISABLED", "false")]).unwrap().is_some());
    }

    #[test]
    fn the_endpoint_of_traces_goes_before_the_one_of_all_signals() {
        let endpoint = |variables: &[(&str, &str)]| {
            let settings = read(variables).unwrap().unwrap();
            format!("{} {} {}", settings.protocol, settings.endpoint, settings.address())
        };
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://other/here?key=secret");
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        insta::assert_snapshot!(
            [endpoint(&[ENDPOINT]), endpoint(&[ENDPOINT, traces]), endpoint(&[ENDPOINT, grpc])].join("\n"),
            @r"
        http/protobuf http://collector:4318/v1/traces http://collector:4318
        http/protobuf https://other/here?key=secret https://other:443
        grpc http://collector:4318/ http://collector:4318
        "
        );
    }

    #[test]
    fn a_service_is_named_by_its_variable_its_attributes_or_the_program() {
        let name = |variables: &[(&str, &str)]| read(variables).unwrap().unwrap().service;
        let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=of%20shop, a=b,");
        assert_eq!(name(&[ENDPOINT]), "person-api");
        assert_eq!(name(&[ENDPOINT, attributes]), "of shop");
        assert_eq!(name(&[ENDPOINT, attributes, ("OTEL_SERVICE_NAME", "mine")]), "mine");
    }

    #[test]
    fn samplers_have_their_standard_names() {
        for (name, arg, sampler) in [
            ("always_on", "", "AlwaysOn"),
            ("parentbased_always_off", "", "ParentBased(AlwaysOff)"),
            ("traceidratio", "0.25", "TraceIdRatioBased(0.25)"),
            ("parentbased_traceidratio", "0", "ParentBased(TraceIdRatioBased(0.0))"),
        ] {
            let variables = [ENDPOINT, (SAMPLER, name), (SAMPLER_ARG, arg)];
            let variables = if arg.is_empty() { &variables[..2] } else { &variables };
            let settings = read(variables).unwrap().unwrap();
            assert_eq!(format!("{:?}", settings.sampler), sampler);
            assert_eq!(settings.parent_based, sampler.starts_with("ParentBased"));
        }
        assert_eq!(format!("{:?}", read(&[ENDPOINT]).unwrap().unwrap().sampler), "ParentBased(AlwaysOn)");
    }

    #[test]
    fn a_wrong_value_is_named_with_an_example_and_secrets_are_not_shown() {
        let wrong = [
            ("OTEL_SDK_DISABLED", "yes"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "localhost:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://user:s3cr3t@collector"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization: s3cr3t"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=s3cr3t%0d%0a"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_RESOURCE_ATTRIBUTES", "shop"),
            ("OTEL_PROPAGATORS", "b3"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "1000000"),
            ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ];
        let mut errors: Vec<String> =
            wrong.iter().map(|(name, value)| with(name, value).expect_err(name)).collect();
        let ratio = [ENDPOINT, (SAMPLER, "traceidratio"), (SAMPLER_ARG, "2")];
        errors.push(read(&ratio).expect_err("a ratio of 2"));
        let errors = errors.join("\n");
        assert!(!errors.contains("s3cr3t"), "{errors}");
        insta::assert_snapshot!(errors);
        with("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20key, tenant=north,").unwrap();
        with("OTEL_EXPORTER_OTLP_COMPRESSION", "none").unwrap();
        assert!(!with("OTEL_PROPAGATORS", "none").unwrap().propagate);
        assert!(with("OTEL_PROPAGATORS", "baggage,tracecontext").unwrap().propagate);
    }
}

//! A receiver of OpenTelemetry traces, over HTTP and gRPC at one address. It can misbehave as a collector may.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http_body_util::{BodyExt, Collected, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{CONTENT_TYPE, HeaderValue, LOCATION},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value},
    trace::v1::{Span, status::StatusCode as SpanStatus},
};
use prost::Message;
use tokio::{net::TcpListener, task::JoinHandle};

/// What it does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Takes the spans.
    Takes,
    /// Keeps what comes over HTTP as it is, to be counted later.
    Keeps,
    /// Never responds.
    IsSilent,
    /// Responds with this status, and leads elsewhere.
    Refuses(u16),
    /// Responds with 200 and bytes that mean nothing.
    Babbles,
    /// Responds with 200 and a body without end.
    Floods,
}

/// A span as it came, with its service.
#[derive(Clone, Debug)]
pub struct Received {
    /// The service's name.
    pub service: String,
    /// The resource's attributes, sorted.
    pub resource: Vec<String>,
    /// The span.
    pub span: Span,
}

#[derive(Debug)]
struct Shared {
    manner: Mutex<Manner>,
    received: Mutex<Vec<Received>>,
    headers: Mutex<Vec<HeaderMap>>,
    requests: AtomicUsize,
    kept: Mutex<Vec<Bytes>>,
    paths: Mutex<BTreeSet<String>>,
}

/// A running receiver. Dropping it ends it.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Collector {
    /// Listens at a free port of 127.0.0.1.
    pub async fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            manner: Mutex::new(Manner::Takes),
            received: Mutex::default(),
            headers: Mutex::default(),
            requests: AtomicUsize::new(0),
            kept: Mutex::default(),
            paths: Mutex::default(),
        });
        let for_all = shared.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = for_all.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| respond(shared.clone(), request));
                    let _ended = Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self { address, shared, task })
    }

    /// Its URL, for both protocols.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it does from now on.
    pub fn behave(&self, manner: Manner) {
        *self.shared.manner.lock().unwrap_or_else(PoisonError::into_inner) = manner;
    }

    /// The spans that it took.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The headers of the requests that it took.
    pub fn headers(&self) -> Vec<HeaderMap> {
        self.shared.headers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The paths of all requests.
    pub fn paths(&self) -> BTreeSet<String> {
        self.shared.paths.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many requests came.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// How many spans it kept since the last call.
    pub fn take_count(&self) -> usize {
        let kept = std::mem::take(&mut *self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner));
        let messages = kept.into_iter().filter_map(|body| ExportTraceServiceRequest::decode(body).ok());
        let scopes = messages.flat_map(|message| message.resource_spans).flat_map(|r| r.scope_spans);
        scopes.map(|scope| scope.spans.len()).sum()
    }

    /// The spans of a trace.
    pub fn trace(&self, trace_id: &str) -> Vec<Received> {
        let of = |received: &Received| hex(&received.span.trace_id) == trace_id;
        self.received().into_iter().filter(of).collect()
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn body(frames: impl IntoIterator<Item = Frame<Bytes>, IntoIter: Send + 'static>) -> Body {
    let frames = futures_util::stream::iter(frames.into_iter().map(Ok));
    StreamBody::new(frames).boxed_unsync()
}

async fn respond(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let path = request.uri().path().to_owned();
    shared.paths.lock().unwrap_or_else(PoisonError::into_inner).insert(path);
    let manner = *shared.manner.lock().unwrap_or_else(PoisonError::into_inner);
    if manner == Manner::Takes {
        shared.headers.lock().unwrap_or_else(PoisonError::into_inner).push(request.headers().clone());
    }
    let is_grpc =
        request.headers().get(CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"));
    let known =
        if is_grpc { "/opentelemetry.proto.collector.trace.v1.TraceService/Export" } else { "/v1/traces" };
    let found = request.uri().path() == known;
    let received = request.into_body().collect().await.map(Collected::to_bytes).unwrap_or_default();
    let with = |status: StatusCode, frames: Vec<Frame<Bytes>>| {
        let mut response = Response::new(body(frames));
        *response.status_mut() = status;
        let type_ = if is_grpc { "application/grpc" } else { "application/x-protobuf" };
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(type_));
        response
    };
    Ok(match manner {
        Manner::IsSilent => std::future::pending().await,
        Manner::Refuses(status) => {
            let status = StatusCode::from_u16(status).unwrap_or_default();
            let mut response = with(status, vec![Frame::data("no".into())]);
            response.headers_mut().insert(LOCATION, HeaderValue::from_static("/elsewhere"));
            response
        }
        Manner::Babbles => with(StatusCode::OK, vec![Frame::data(Bytes::from_static(&[0xff; 1000]))]),
        Manner::Floods => {
            let mut response = with(StatusCode::OK, Vec::new());
            *response.body_mut() =
                body(std::iter::repeat_with(|| Frame::data(Bytes::from_static(&[0x0a; 16_384]))));
            response
        }
        Manner::Keeps => {
            shared.kept.lock().unwrap_or_else(PoisonError::into_inner).push(received);
            with(StatusCode::OK, Vec::new())
        }
        Manner::Takes if !found => with(StatusCode::NOT_FOUND, Vec::new()),
        Manner::Takes => {
            // Behind a flag and the length.
            let message = if is_grpc { received.get(5..).unwrap_or_default() } else { &received[..] };
            let Ok(message) = ExportTraceServiceRequest::decode(message) else {
                return Ok(with(StatusCode::BAD_REQUEST, Vec::new()));
            };
            shared.take(message);
            if is_grpc {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                with(
                    StatusCode::OK,
                    vec![Frame::data(Bytes::from_static(&[0; 5])), Frame::trailers(trailers)],
                )
            } else {
                with(StatusCode::OK, Vec::new())
            }
        }
    })
}

impl Shared {
    fn take(&self, message: ExportTraceServiceRequest) {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        for resource in message.resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = attributes.iter().find(|a| a.key == "service.name").map(value).unwrap_or_default();
            let mut shown: Vec<String> = attributes.iter().map(attribute).collect();
            shown.sort_unstable();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                received.push(Received { service: service.clone(), resource: shown.clone(), span });
            }
        }
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    let digits = |byte: &u8| [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16));
    bytes.iter().flat_map(digits).flatten().collect()
}

fn attribute(attribute: &KeyValue) -> String {
    format!("{}={}", attribute.key, value(attribute))
}

fn value(attribute: &KeyValue) -> String {
    match &attribute.value {
        Some(AnyValue { value: Some(any_value::Value::StringValue(text)) }) => text.clone(),
        Some(AnyValue { value: Some(any_value::Value::IntValue(number)) }) => number.to_string(),
        other => format!("{other:?}"),
    }
}

impl Received {
    /// An attribute.
    pub fn attribute(&self, name: &str) -> Option<String> {
        self.span.attributes.iter().find(|attribute| attribute.key == name).map(value)
    }
}

/// Spans as a tree: each under its parent, those of one parent by their names. A link shows the name of its span.
pub struct Tree<'a>(pub &'a [Received]);

impl fmt::Display for Tree<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_root =
            |one: &&Received| !self.0.iter().any(|other| other.span.span_id == one.span.parent_span_id);
        self.level(f, &is_root, 0)
    }
}

impl Tree<'_> {
    fn level(
        &self,
        f: &mut fmt::Formatter<'_>,
        here: &dyn Fn(&&Received) -> bool,
        depth: usize,
    ) -> fmt::Result {
        let mut spans: Vec<&Received> = self.0.iter().filter(here).collect();
        spans
            .sort_by_key(|one| (&one.span.name, one.attribute("messaging.rabbitmq.destination.routing_key")));
        for one in spans {
            let span = &one.span;
            let indent = "  ".repeat(depth);
            let kind = format!("{:?}", span.kind()).to_lowercase();
            writeln!(f, "{indent}{} · {kind} · {}", one.service, span.name)?;
            let mut attributes: Vec<String> = span.attributes.iter().map(attribute).collect();
            attributes.sort_unstable();
            for attribute in attributes {
                writeln!(f, "{indent}    {attribute}")?;
            }
            if span.status.as_ref().is_some_and(|status| status.code == SpanStatus::Error as i32) {
                writeln!(f, "{indent}    error")?;
            }
            for link in &span.links {
                let linked = self.0.iter().find(|other| other.span.span_id == link.span_id);
                let name = linked.map_or("a span of another trace", |other| &other.span.name);
                writeln!(f, "{indent}    linked to {name}")?;
            }
            self.level(f, &|other| other.span.parent_span_id == span.span_id, depth + 1)?;
        }
        Ok(())
    }
}

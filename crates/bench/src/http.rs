//! A minimal HTTP load generator: keep-alive connections that send a request and read its response. On two cores a complete
//! HTTP library would take processor time from the program that is measured.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::Instant,
};

/// Timeout of a response.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A keep-alive connection.
#[derive(Debug)]
pub(crate) struct Client {
    stream: TcpStream,
    response: Vec<u8>,
}

/// A response, valid until the next request.
#[derive(Debug)]
pub(crate) struct Response<'a> {
    pub(crate) status: u16,
    pub(crate) head: &'a str,
    pub(crate) body: &'a [u8],
}

impl Response<'_> {
    /// A header by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(self.head, name)
    }

    /// Fails with the body unless it has this status.
    pub(crate) fn expect(&self, status: u16) -> anyhow::Result<()> {
        let body = || String::from_utf8_lossy(self.body).into_owned();
        ensure!(self.status == status, "the status is {} instead of {status}: {}", self.status, body());
        Ok(())
    }
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let stream =
            TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, response: Vec::with_capacity(4096) })
    }

    /// Sends a request, as [`get`] and [`post`] write it, and reads the response to its end.
    pub(crate) async fn send(&mut self, request: &str) -> anyhow::Result<Response<'_>> {
        let exchange = async {
            self.stream.write_all(request.as_bytes()).await?;
            self.response.clear();
            loop {
                ensure!(self.stream.read_buf(&mut self.response).await? > 0, "the connection was closed");
                if let Some((head, end)) = complete(&self.response)? {
                    return Ok((head, end));
                }
            }
        };
        let (head, end) = tokio::time::timeout(TIMEOUT, exchange).await.context("no response in time")??;
        let text = std::str::from_utf8(&self.response[..head])?;
        let status =
            text.get(9..12).and_then(|code| code.parse().ok()).context("no status in the response")?;
        Ok(Response { status, head: text, body: &self.response[head..end] })
    }
}

/// Where head and response end, once the response is complete.
fn complete(bytes: &[u8]) -> anyhow::Result<Option<(usize, usize)>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let (head, body) = (std::str::from_utf8(&bytes[..end])?, end + 4);
    let Some(length) = header(head, "content-length") else {
        bail!("a response without content-length: {head}");
    };
    let whole = body + length.parse::<usize>()?;
    Ok((bytes.len() >= whole).then_some((body, whole)))
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

pub(crate) fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

pub(crate) fn post(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Where a program listens.
pub(crate) fn address(url: &str) -> anyhow::Result<SocketAddr> {
    url.trim_start_matches("http://").parse().with_context(|| format!("{url} is no address"))
}

/// Requests per second of `clients` connections, each of which sends its next request as soon as it has a response. Every
/// response must have this status.
pub(crate) async fn load(
    address: SocketAddr,
    clients: usize,
    length: Duration,
    status: u16,
    request: impl Fn() -> String + Clone + Send + 'static,
) -> anyhow::Result<f64> {
    let mut connected = Vec::new();
    for _ in 0..clients {
        connected.push(Client::connect(address).await?);
    }
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for mut client in connected {
        let request = request.clone();
        tasks.spawn(async move {
            let mut answered = 0_i64;
            while begin.elapsed() < length {
                client.send(&request()).await?.expect(status)?;
                answered += 1;
            }
            anyhow::Ok(answered)
        });
    }
    let mut answered = 0;
    while let Some(task) = tasks.join_next().await {
        answered += task??;
    }
    Ok(super::statistics::rate(answered, begin.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_complete_with_its_last_byte() {
        let response = b"HTTP/1.1 201 Created\r\netag: \"a.1\"\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(complete(response).unwrap(), Some((response.len() - 3, response.len())));
        for cut in 0..response.len() {
            assert_eq!(complete(&response[..cut]).unwrap(), None);
        }
        assert!(complete(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}

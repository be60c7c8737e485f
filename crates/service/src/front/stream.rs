//! A connection's bytes, and what they say of the client: that it sends, takes, or has hung up.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::{clients::Client, observe::refusal};
use crate::problem::{HEAD_TOO_LARGE, Kind, MALFORMED_REQUEST};

/// How long, and how much, is read of what a client still sends after its last answer.
const LINGER: (Duration, usize) = (Duration::from_secs(1), 256 * 1024);

/// The stream of one client.
pub(super) struct Stream {
    tcp: TcpStream,
    client: Arc<Client>,
    ended: bool,
}

impl Stream {
    pub(super) fn new(tcp: TcpStream, client: Arc<Client>) -> Self {
        Self { tcp, client, ended: false }
    }

    /// Says a last thing, if the client still takes it.
    pub(super) fn say(&self, last: &[u8]) {
        // The system has room for so little, unless the client left earlier answers where they are.
        let _ = self.tcp.try_write(last);
    }

    /// Hears the client out after its last answer, within bounds. To close earlier would reset the
    /// connection, and take the answer from a client that still sends.
    pub(super) async fn linger(mut self) {
        let hear = async {
            let (mut waste, mut left) = ([0; 4096], LINGER.1);
            while !self.ended && left > 0 {
                let read = self.tcp.read(&mut waste).await?;
                self.ended = read == 0;
                left = left.saturating_sub(read);
            }
            io::Result::Ok(())
        };
        tokio::select! {
            // Whatever comes of it, the connection is over.
            _ = timeout(LINGER.0, hear) => {}
            () = self.client.over() => {}
        }
    }

    fn wrote(&self, written: &Poll<io::Result<usize>>) {
        match written {
            Poll::Ready(Ok(_)) => self.client.took(),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.client.stalls(),
        }
    }

    /// Says in hyper's place what it says without a word of explanation, to what is no request. True: it is said.
    fn refuses(&self, answer: &[u8]) -> bool {
        let kind = refused(answer);
        if let Some(kind) = kind {
            self.say(&refusal(kind));
        }
        kind.is_some()
    }
}

/// Why hyper refuses, if this is the whole of its answer: one of ours always says what its body is.
fn refused(answer: &[u8]) -> Option<&'static Kind> {
    const VERSION: usize = "HTTP/1.1 ".len();
    if !answer.starts_with(b"HTTP/1.") {
        return None;
    }
    let (head, body) = std::str::from_utf8(answer).ok()?.get(VERSION..)?.split_once("\r\n\r\n")?;
    if !body.is_empty() || head.contains("\r\ncontent-type: ") {
        return None;
    }
    match head.split(' ').next()? {
        "400" => Some(&MALFORMED_REQUEST),
        "414" | "431" => Some(&HEAD_TOO_LARGE),
        _ => None,
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (room, before) = (buf.remaining(), buf.filled().len());
        let read = ready!(Pin::new(&mut self.tcp).poll_read(cx, buf));
        let came = &buf.filled()[before..];
        if read.is_err() || (room > 0 && came.is_empty()) {
            self.ended = true;
        } else if came.iter().any(|byte| !b"\r\n".contains(byte)) {
            // Empty lines between requests are none of either (RFC 9112, 2.2).
            self.client.received();
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.refuses(buf) {
            return Poll::Ready(Ok(buf.len()));
        }
        let written = Pin::new(&mut self.tcp).poll_write(cx, buf);
        self.wrote(&written);
        written
    }

    /// hyper flushes when it has written all that it has.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.client.took_all();
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [one] = bufs
            && self.refuses(one)
        {
            return Poll::Ready(Ok(one.len()));
        }
        let written = Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs);
        self.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }
}

//! What comes from the broker, seen through before lapin reads it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_io::{AsyncRead, AsyncWrite};

use crate::{
    header::{readable, spelled},
    reader::Reader,
};

/// The largest frame that is asked for, unless the URL says otherwise: RabbitMQ's own default. lapin has buffers
/// for 64 of them, also when the broker would allow any size.
pub(crate) const LARGEST_FRAME: u32 = 128 * 1024;
/// How much is read at once.
const CHUNK: usize = 64 * 1024;
/// Type, channel and length.
const HEAD: usize = 7;
/// How much of one frame is looked at. A header that is longer loses what is behind it.
const LARGEST: usize = 1 << 20;
/// No side may ask for less.
const SMALLEST: u32 = 4096;

/// Types of frames, and the byte at the end of each.
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
const END: u8 = 0xCE;

/// Classes and methods of which something has to be known.
const CONNECTION: u8 = 10;
const TUNE: u8 = 30;
const BASIC: u8 = 60;
const RETURN: u8 = 50;
const DELIVER: u8 = 60;
const GET_OK: u8 = 71;

/// A connection of which each frame is seen through, one that lapin cannot read made so that it can.
pub(crate) struct Screened<S> {
    inner: S,
    incoming: Box<[u8]>,
    screen: Screen,
}

impl<S> Screened<S> {
    /// `largest` is what this side offers as the largest frame.
    pub(crate) fn new(inner: S, largest: u32) -> Self {
        let screen = Screen { ours: largest, limit: largest, ..Screen::default() };
        Self { inner, incoming: vec![0; CHUNK].into(), screen }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Screened<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            let taken = this.screen.pop(buffer);
            if taken > 0 {
                return Poll::Ready(Ok(taken));
            }
            let count = ready!(Pin::new(&mut this.inner).poll_read(cx, &mut this.incoming))?;
            if count == 0 {
                return Poll::Ready(Ok(0));
            }
            this.screen.push(&this.incoming[..count])?;
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Screened<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_close(cx)
    }
}

/// Where in the stream of frames it is.
#[derive(Default)]
enum State {
    /// Before a frame, or in its first bytes.
    #[default]
    Head,
    /// In a frame that is looked at when it is whole: so many bytes are to come.
    Whole(usize),
    /// In a frame that lapin takes as it is.
    Pass(usize),
    /// There are no frames: the broker refuses the protocol.
    Foreign,
}

/// Frames as they come in, and as they go on.
#[derive(Default)]
struct Screen {
    /// What this side offers as the largest frame, and what holds since the broker made its own offer.
    ours: u32,
    limit: u32,
    state: State,
    /// The frame that is being collected.
    frame: Vec<u8>,
    /// What lapin may read, and how much of it it has.
    out: Vec<u8>,
    read: usize,
}

impl Screen {
    fn pop(&mut self, buffer: &mut [u8]) -> usize {
        let ready = &self.out[self.read..];
        let count = ready.len().min(buffer.len());
        buffer[..count].copy_from_slice(&ready[..count]);
        self.read += count;
        if self.read == self.out.len() {
            self.out.clear();
            self.out.shrink_to(2 * CHUNK);
            self.read = 0;
        }
        count
    }

    fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let wanted = match self.state {
                State::Head => HEAD - self.frame.len(),
                State::Whole(left) | State::Pass(left) => left,
                State::Foreign => bytes.len(),
            };
            let (taken, rest) = bytes.split_at(wanted.min(bytes.len()));
            let left = wanted - taken.len();
            bytes = rest;
            match self.state {
                State::Pass(_) | State::Foreign => self.out.extend_from_slice(taken),
                State::Head | State::Whole(_) => {
                    let room = (HEAD + LARGEST).saturating_sub(self.frame.len());
                    self.frame.extend_from_slice(&taken[..taken.len().min(room)]);
                }
            }
            match self.state {
                State::Head if left == 0 => self.begin(),
                State::Foreign | State::Head => {}
                State::Whole(_) if left == 0 => self.end()?,
                State::Whole(_) => self.state = State::Whole(left),
                State::Pass(_) if left == 0 => self.state = State::Head,
                State::Pass(_) => self.state = State::Pass(left),
            }
        }
        Ok(())
    }

    /// How long the payload of the frame is, by what stands before it.
    fn payload(&self) -> usize {
        let length = self.frame.get(3..HEAD).and_then(<[u8]>::first_chunk);
        length.map_or(0, |length| usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX))
    }

    /// The type of a frame and its length are known.
    fn begin(&mut self) {
        // The byte that ends each frame comes behind it.
        let length = self.payload().saturating_add(1);
        self.state = match self.frame[0] {
            METHOD | HEADER => State::Whole(length),
            BODY | HEARTBEAT => State::Pass(length),
            _ => State::Foreign,
        };
        if !matches!(self.state, State::Whole(_)) {
            self.out.append(&mut self.frame);
        }
    }

    /// A frame is there.
    fn end(&mut self) -> io::Result<()> {
        self.state = State::Head;
        let whole = self.frame.len() == HEAD + self.payload() + 1;
        if self.frame[0] == METHOD {
            if !whole {
                let bytes = self.payload();
                let error = format!("the broker sent a method of {bytes} bytes, which no method has");
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            self.method();
            self.out.append(&mut self.frame);
            return Ok(());
        }
        let payload = &self.frame[HEAD..self.frame.len() - usize::from(whole)];
        // Around its payload each frame has eight bytes.
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX).saturating_sub(HEAD + 1);
        if let Some((payload, removed)) = readable(payload, whole, limit) {
            if !removed.is_empty() {
                tracing::warn!(%removed, "headers of a message cannot be received and were removed from it");
            }
            self.out.extend_from_slice(&self.frame[..3]);
            self.out.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
            self.out.extend(payload);
            self.out.push(END);
            self.frame.clear();
            self.frame.shrink_to(2 * CHUNK);
        } else {
            self.out.append(&mut self.frame);
        }
        Ok(())
    }

    /// Learns what was agreed, and makes names of exchanges and routing keys such that they can be read.
    fn method(&mut self) {
        let mut method = Reader::new(&self.frame[HEAD..]);
        let Some(&[_, class, _, id]) = method.take(4) else { return };
        let before = match (class, id) {
            (CONNECTION, TUNE) => {
                let theirs = method.take(2).and_then(|_| method.take(4)).and_then(<[u8]>::first_chunk);
                self.limit = match theirs.map(|theirs| u32::from_be_bytes(*theirs)) {
                    None | Some(0) => self.ours,
                    Some(theirs) => theirs.min(self.ours).max(SMALLEST),
                };
                return;
            }
            (BASIC, DELIVER) => method.short().and_then(|_| method.take(8 + 1)),
            (BASIC, GET_OK) => method.take(8 + 1),
            (BASIC, RETURN) => method.take(2).and_then(|_| method.short()),
            _ => None,
        };
        if before.is_none() {
            return;
        }
        for _ in 0..2 {
            let Some(text) = method.short() else { return };
            let (start, spelled) = (self.frame.len() - method.rest().len() - text.len(), spelled(text));
            if spelled != text {
                self.frame[start..start + spelled.len()].copy_from_slice(&spelled);
            }
            method = Reader::new(&self.frame[start + spelled.len()..]);
        }
    }
}

#[cfg(test)]
mod tests;

//! A publisher that writes its frames itself: what no client library would send, but anybody can.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::Duration,
};

use lapin::uri::AMQPUri;

/// AMQP's class of connections, of channels, of messages and of confirms.
const CONNECTION: u16 = 10;
const CHANNEL: u16 = 20;
const BASIC: u16 = 60;
const CONFIRM: u16 = 85;

/// A connection with one channel, on which the broker confirms.
#[derive(Debug)]
pub struct RawPublisher {
    stream: TcpStream,
    largest: u32,
}

impl RawPublisher {
    /// Connects to an `amqp://` URL.
    pub fn connect(url: &str) -> io::Result<Self> {
        let uri: AMQPUri = url.parse().map_err(io::Error::other)?;
        let stream = TcpStream::connect((uri.authority.host.as_str(), uri.authority.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut raw = Self { stream, largest: 0 };
        raw.stream.write_all(b"AMQP\x00\x00\x09\x01")?;
        raw.wait(CONNECTION, 10)?;
        let user = uri.authority.userinfo;
        let plain = [b"\0".as_slice(), user.username.as_bytes(), b"\0", user.password.as_bytes()].concat();
        let start = [&[0; 4], short(b"PLAIN").as_slice(), &long(&plain), &short(b"en_US")].concat();
        raw.method(0, CONNECTION, 11, &start)?;
        let tune = raw.wait(CONNECTION, 30)?;
        raw.largest = u32::from_be_bytes([tune[2], tune[3], tune[4], tune[5]]);
        raw.method(0, CONNECTION, 31, &tune[..6].iter().chain(&[0, 0]).copied().collect::<Vec<_>>())?;
        raw.method(0, CONNECTION, 40, &[short(uri.vhost.as_bytes()).as_slice(), &[0, 0]].concat())?;
        raw.wait(CONNECTION, 41)?;
        raw.method(1, CHANNEL, 10, &[0])?;
        raw.wait(CHANNEL, 11)?;
        raw.method(1, CONFIRM, 10, &[0])?;
        raw.wait(CONFIRM, 11)?;
        Ok(raw)
    }

    /// The largest frame that the broker takes.
    pub fn largest(&self) -> u32 {
        self.largest
    }

    /// Publishes, and waits until the broker has confirmed. `properties` are the content header's flags and what
    /// they stand for, as bytes.
    pub fn publish(
        &mut self,
        exchange: &str,
        routing_key: &[u8],
        properties: &[u8],
        body: &[u8],
    ) -> io::Result<()> {
        let publish = [&[0, 0], short(exchange.as_bytes()).as_slice(), &short(routing_key), &[0]].concat();
        self.method(1, BASIC, 40, &publish)?;
        let header = [&[0, 60, 0, 0], (body.len() as u64).to_be_bytes().as_slice(), properties].concat();
        self.frame(2, 1, &header)?;
        for piece in body.chunks(self.largest as usize - 8) {
            self.frame(3, 1, piece)?;
        }
        self.wait(BASIC, 80).map(drop)
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) -> io::Result<()> {
        let method = [&class.to_be_bytes(), method.to_be_bytes().as_slice(), arguments].concat();
        self.frame(1, channel, &method)
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?.to_be_bytes();
        let frame = [&[kind], channel.to_be_bytes().as_slice(), &length, payload, &[0xCE]].concat();
        self.stream.write_all(&frame)
    }

    /// The arguments of this method, which has to come; whatever else comes is passed over, but for an end.
    fn wait(&mut self, class: u16, method: u16) -> io::Result<Vec<u8>> {
        loop {
            let mut head = [0; 7];
            self.stream.read_exact(&mut head)?;
            let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
            let mut payload = vec![0; length as usize + 1];
            self.stream.read_exact(&mut payload)?;
            if head[0] != 1 {
                continue;
            }
            let found =
                (u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]]));
            if found == (class, method) {
                return Ok(payload[4..].to_vec());
            }
            if matches!(found, (CONNECTION, 50) | (CHANNEL, 40) | (BASIC, 120)) {
                return Err(io::Error::other(String::from_utf8_lossy(&payload[4..]).into_owned()));
            }
        }
    }
}

/// A short string as it is written.
///
/// # Panics
/// When it is longer than 255 bytes.
pub fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).expect("at most 255 bytes")], text].concat()
}

/// A long string, or a table, as it is written.
///
/// # Panics
/// When it is longer than 4 GiB.
pub fn long(text: &[u8]) -> Vec<u8> {
    [u32::try_from(text.len()).expect("at most 4 GiB").to_be_bytes().as_slice(), text].concat()
}

/// Arrays in arrays, the type of the outermost before it. Built from the outside in: the other way each level
/// would be copied again.
pub fn nested(levels: usize) -> Vec<u8> {
    let mut value = Vec::new();
    for level in (0..levels).rev() {
        value.push(b'A');
        value.extend(u32::try_from(level * 5).expect("at most 4 GiB").to_be_bytes());
    }
    value
}

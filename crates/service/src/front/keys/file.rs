//! The file of keys.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use sha2::{Digest, Sha256};

use super::{Key, Secret};
use crate::front::Caller;

/// The shortest secret. One that can be guessed is none; 16 random bytes in hex have 32.
const SHORTEST: usize = 16;

/// The longest name of a key.
const LONGEST_NAME: usize = 64;

/// Tells whether a file is another one than before: written to, or replaced by rename, also behind a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    device: u64,
    inode: u64,
    changed: (i64, i64),
    size: u64,
}

/// The file as it is now.
pub(super) fn mark(path: &Path) -> io::Result<Mark> {
    let file = fs::metadata(path)?;
    let changed = (file.ctime(), file.ctime_nsec());
    Ok(Mark { device: file.dev(), inode: file.ino(), changed, size: file.size() })
}

/// Why there are no keys in a file. Says which line, and never what is in it.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("line {line}: {problem}")]
    Line { line: usize, problem: &'static str },
    #[error("has no key; there should be a line such as name:secret")]
    Empty,
    #[error("everybody on this machine may write it; chmod o-w")]
    Writable,
}

/// The keys in the file.
pub(super) fn read(path: &Path) -> Result<Vec<Key>, FileError> {
    let text = fs::read(path)?;
    if fs::metadata(path)?.mode() & 0o002 != 0 {
        return Err(FileError::Writable);
    }
    parse(&text)
}

/// A key a line; lines that are empty or begin with `#` are none.
fn parse(text: &[u8]) -> Result<Vec<Key>, FileError> {
    let mut keys: Vec<Key> = Vec::new();
    for (line, text) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let text = text.trim_ascii();
        if text.is_empty() || text.starts_with(b"#") {
            continue;
        }
        let key = key(text).map_err(|problem| FileError::Line { line, problem })?;
        if keys.iter().any(|other| other.secret == key.secret) {
            return Err(FileError::Line { line, problem: "the secret is that of an earlier line" });
        }
        keys.push(key);
    }
    if keys.is_empty() { Err(FileError::Empty) } else { Ok(keys) }
}

fn key(text: &[u8]) -> Result<Key, &'static str> {
    let colon = text.iter().position(|byte| *byte == b':').ok_or("it should look like name:secret")?;
    let (name, secret) = (&text[..colon], &text[colon + 1..]);
    let sane = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    let name = std::str::from_utf8(name).ok().filter(|name| name.bytes().all(|byte| sane(&byte)));
    let name = name
        .filter(|name| (1..=LONGEST_NAME).contains(&name.len()))
        .ok_or("the name should have 1 to 64 letters, digits, '.', '_' or '-'")?;
    if name == Caller::anonymous().name() {
        return Err("the name is that of those who have no key");
    }
    Ok(Key { caller: Caller::new(name), secret: self::secret(secret)? })
}

fn secret(text: &[u8]) -> Result<Secret, &'static str> {
    const DIGEST: &[u8] = b"sha256:";
    if let Some((prefix, hex)) = text.split_at_checked(DIGEST.len())
        && prefix.eq_ignore_ascii_case(DIGEST)
    {
        return digest(hex).ok_or("the digest should have 64 hexadecimal digits");
    }
    if text.len() < SHORTEST || !text.iter().all(u8::is_ascii_graphic) {
        return Err("the secret should have 16 or more visible ASCII characters");
    }
    Ok(Sha256::digest(text).into())
}

fn digest(hex: &[u8]) -> Option<Secret> {
    let mut digest = Secret::default();
    if hex.len() != 2 * digest.len() {
        return None;
    }
    for (byte, digits) in digest.iter_mut().zip(hex.chunks(2)) {
        let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|d| d.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> String {
        match parse(text.as_bytes()) {
            Ok(keys) => keys.iter().map(|key| key.caller.name().to_owned()).collect::<Vec<_>>().join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_file_is_read_whole_or_not_at_all() {
        let digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let right = format!(
            "# both until Monday\r\nshop:0123456789abcdef\n\n shop:0123456789abcdeg \nbank.2:SHA256:{digest}"
        );
        assert_eq!(said(&right), "shop shop bank.2");
        assert_eq!(
            parse(b"a:SHA256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08").unwrap()[0]
                .secret[..2],
            [0x9f, 0x86]
        );
        let wrong = [
            "",
            "# nobody\n",
            "shop",
            "shop:0123456789abcde",
            "shop:0123456789 abcdef",
            ":0123456789abcdef",
            "the shop:0123456789abcdef",
            "anonymous:0123456789abcdef",
            "a:0123456789abcdef\nb:0123456789abcdef",
            "a:0123456789abcdef\n\nshop:sha256:12",
            "a:sha256:zz86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "a:sha256:+f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        ];
        let shown: Vec<String> = wrong.iter().map(|text| format!("{text:?}: {}", said(text))).collect();
        for text in wrong.iter().filter(|text| text.contains("0123456789")) {
            assert!(!said(text).contains("0123456789"), "a secret is shown");
        }
        insta::assert_snapshot!(shown.join("\n"));
    }
}

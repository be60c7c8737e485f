//! The file of keys.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use daemon::config::permissions;
use sha2::{Digest, Sha256};

use crate::front::caller::Caller;

/// The shortest secret: 16 random bytes in hex have 32 characters.
const SHORTEST: usize = 16;
/// The longest name of a key.
const LONGEST_NAME: usize = 64;

/// SHA-256 of a secret.
pub(super) type Secret = [u8; 32];

/// A key, without its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    pub(super) caller: Caller,
    /// Its digest.
    pub(super) secret: Secret,
}

impl Key {
    /// The client that has it.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }
}

/// Changes when the file is written to, gets other permissions, or is replaced, also behind a link: device, inode, time of
/// change and size.
pub(super) type FileState = (u64, u64, i64, i64, u64);

/// The state of the file; none if it does not exist.
pub(super) fn file_state(path: &Path) -> Option<FileState> {
    let file = fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec(), file.size()))
}

/// The keys in the file; or why there are none, without anything that is in it.
pub(super) fn read(path: &Path) -> Result<Vec<Key>, String> {
    let unreadable = |error| format!("cannot be read: {error}");
    let text = fs::read(path).map_err(unreadable)?;
    if fs::metadata(path).map_err(unreadable)?.mode() & 0o002 != 0 {
        return Err("every user of this machine may write it; chmod o-w".to_owned());
    }
    let keys = parse(&text)?;
    permissions::warn_if_others_read("API_KEYS_FILE", path);
    Ok(keys)
}

/// A key a line; lines that are empty or begin with `#` are none.
fn parse(text: &[u8]) -> Result<Vec<Key>, String> {
    let mut keys: Vec<Key> = Vec::new();
    for (line, text) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let text = text.trim_ascii();
        if text.is_empty() || text.starts_with(b"#") {
            continue;
        }
        let key = key(text).map_err(|problem| format!("line {line}: {problem}"))?;
        if keys.iter().any(|other| other.secret == key.secret) {
            return Err(format!("line {line}: the secret is that of an earlier line"));
        }
        keys.push(key);
    }
    if keys.is_empty() { Err("has no key; write a line such as name:secret".to_owned()) } else { Ok(keys) }
}

fn key(text: &[u8]) -> Result<Key, &'static str> {
    // Secrets and names are of visible characters, so nothing of a line is lost by reading it as text.
    let text = String::from_utf8_lossy(text);
    let (name, secret) = text.split_once(':').ok_or("it should look like name:secret")?;
    let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !(1..=LONGEST_NAME).contains(&name.len()) || !name.bytes().all(sane) {
        return Err("the name should have 1 to 64 letters, digits, '.', '_' or '-'");
    }
    if name == Caller::anonymous().name() {
        return Err("the name is that of clients without a key");
    }
    Ok(Key { caller: Caller::new(name), secret: self::secret(secret)? })
}

fn secret(text: &str) -> Result<Secret, &'static str> {
    const DIGEST: &str = "sha256:";
    if let Some((prefix, hex)) = text.split_at_checked(DIGEST.len())
        && prefix.eq_ignore_ascii_case(DIGEST)
    {
        let mut digest = Secret::default();
        let decoded = hex::decode_to_slice(hex, &mut digest);
        return decoded.map(|()| digest).map_err(|_| "the digest should have 64 hexadecimal digits");
    }
    if text.len() < SHORTEST || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the secret should have 16 or more visible ASCII characters");
    }
    Ok(Sha256::digest(text).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> String {
        match parse(text.as_bytes()) {
            Ok(keys) => keys.iter().map(|key| key.caller.name().to_owned()).collect::<Vec<_>>().join(" "),
            Err(error) => error,
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

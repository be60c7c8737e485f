//! Tags that name a state of a record: its id, a dot, and its version. An `ETag` is a tag in quotation marks.
//!
//! A tag has one spelling. Another one that came to the same numbers would be taken here and refused by a cache or
//! a proxy, which compare tags as text.

use std::{fmt, str::FromStr};

use uuid::Uuid;

/// A state of a record: `"<id>.<version>"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Which record.
    pub id: Uuid,
    /// Which version of it, from 1 on.
    pub version: i64,
}

/// A text that is no tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it should be an id, a dot and a version")]
pub struct NotATag;

/// As an `ETag`, in its quotation marks.
impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}.{}\"", self.id, self.version)
    }
}

/// Takes it with or without its quotation marks, and as weak as a proxy that compresses makes it (`W/"…"`).
impl FromStr for Tag {
    type Err = NotATag;

    fn from_str(text: &str) -> Result<Self, NotATag> {
        let bare = match text.strip_prefix("W/").unwrap_or(text).strip_prefix('"') {
            Some(quoted) => quoted.strip_suffix('"').ok_or(NotATag)?,
            None => text,
        };
        Self::bare(bare).ok_or(NotATag)
    }
}

impl Tag {
    /// Without quotation marks, and in no other spelling than the one that [`Display`](fmt::Display) writes.
    fn bare(text: &str) -> Option<Self> {
        let (id, version) = text.split_once('.')?;
        let tag =
            Self { id: id.parse().ok()?, version: version.parse().ok().filter(|version| *version > 0)? };
        let mut buffer = Uuid::encode_buffer();
        let same = tag.id.hyphenated().encode_lower(&mut buffer) == id && tag.version.to_string() == version;
        same.then_some(tag)
    }
}

/// What `If-Match` and `If-None-Match` hold (RFC 9110, 13.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tags {
    /// `*`: any state.
    Any,
    /// These. A tag of another form names no state, and is left out.
    Of(Vec<Tag>),
}

impl Default for Tags {
    /// None.
    fn default() -> Self {
        Self::Of(Vec::new())
    }
}

impl Tags {
    /// Reads a list of entity tags. One of ours is taken without its quotation marks, too. None: it is no such
    /// list, or an empty one.
    ///
    /// A weak tag counts like a strong one. That differs from RFC 9110, 13.1.1, for `If-Match`: a proxy that
    /// compresses a response weakens its tag, and a client that sends the weak tag back would always be refused. The tags of
    /// this module name one state exactly, in whatever coding it was sent, so nothing is lost.
    pub fn parse(text: &str) -> Option<Self> {
        if text.trim() == "*" {
            return Some(Self::Any);
        }
        let (mut tags, mut count) = (Vec::new(), 0);
        let mut list = text;
        loop {
            // A list may have empty elements (RFC 9110, 5.6.1).
            list = list.trim_start_matches([',', ' ', '\t']);
            if list.is_empty() {
                break;
            }
            let (tag, rest) = next(list)?;
            tags.extend(Tag::bare(tag));
            count += 1;
            list = rest;
        }
        (count > 0).then_some(Self::Of(tags))
    }

    /// Whether this state is among them.
    pub fn name(&self, tag: Tag) -> bool {
        match self {
            Self::Any => true,
            Self::Of(tags) => tags.contains(&tag),
        }
    }
}

/// The next tag of a list, without its quotation marks, and the rest of the list.
fn next(list: &str) -> Option<(&str, &str)> {
    let quoted = list.strip_prefix("W/").unwrap_or(list).strip_prefix('"');
    let (tag, rest) = if let Some(quoted) = quoted {
        quoted.split_once('"')?
    } else {
        let (tag, rest) = list.split_at(list.find(',').unwrap_or(list.len()));
        let tag = tag.trim_end();
        Tag::bare(tag)?;
        (tag, rest)
    };
    let rest = rest.trim_start_matches([' ', '\t']);
    (rest.is_empty() || rest.starts_with(',')).then_some((tag, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0198c0de-0000-7000-8000-00000000000a";

    fn tag(version: i64) -> Tag {
        Tag { id: ID.parse().unwrap(), version }
    }

    /// Texts that come near to `ID.4` and are not it.
    fn others() -> Vec<String> {
        let simple = ID.replace('-', "");
        vec![
            String::new(),
            ".".into(),
            ID.into(),
            format!("{ID}."),
            format!("{ID}.0"),
            format!("{ID}.-4"),
            format!("{ID}.+4"),
            format!("{ID}.04"),
            format!("{ID}.4.4"),
            format!("{ID}.4 "),
            format!(" {ID}.4"),
            format!("{ID}.4x"),
            format!("{ID}.4e0"),
            format!("{ID}.\u{664}"),
            format!("{ID}.9223372036854775808"),
            format!("urn:uuid:{ID}.4"),
            format!("{{{ID}}}.4"),
            format!("{simple}.4"),
            format!("{}.4", ID.to_uppercase()),
            format!("{}.4", ID.replace('a', "A")),
            format!("{}.4", ID.replace('a', "g")),
            format!("{ID}.4-gzip"),
        ]
    }

    #[test]
    fn a_tag_has_one_spelling() {
        assert_eq!(tag(4).to_string(), format!("\"{ID}.4\""));
        for text in [format!("{ID}.4"), tag(4).to_string(), format!("W/{}", tag(4))] {
            assert_eq!(text.parse(), Ok(tag(4)), "{text}");
        }
        let last = format!("{ID}.{}", i64::MAX);
        assert_eq!(last.parse(), Ok(tag(i64::MAX)));
        for text in others() {
            assert_eq!(text.parse::<Tag>(), Err(NotATag), "{text}");
            assert_eq!(format!("\"{text}\"").parse::<Tag>(), Err(NotATag), "{text}");
        }
        for text in ["\"".to_owned(), format!("\"{ID}.4"), format!("{ID}.4\""), format!("\"\"{ID}.4\"\"")] {
            assert_eq!(text.parse::<Tag>(), Err(NotATag), "{text}");
        }
        for text in [format!("W/{ID}.4"), format!("w/\"{ID}.4\"")] {
            assert_eq!(text.parse::<Tag>(), Err(NotATag), "{text}");
        }
    }

    #[test]
    fn a_list_of_tags_names_the_states_that_are_ours() {
        let of = |versions: &[i64]| Some(Tags::Of(versions.iter().copied().map(tag).collect()));
        assert_eq!(Tags::parse(" * "), Some(Tags::Any));
        for (text, versions) in [
            (format!("\"{ID}.4\""), &[4][..]),
            (format!("{ID}.4"), &[4]),
            (format!("{ID}.4 ,\"{ID}.5\""), &[4, 5]),
            (format!(", \"a,b\" ,,\t\"{ID}.5\","), &[5]),
            (format!("W/\"{ID}.4\", \"{ID}.5\""), &[4, 5]),
            ("\"\"".to_owned(), &[]),
            (format!("\"{ID}.x\", \"*\""), &[]),
        ] {
            assert_eq!(Tags::parse(&text), of(versions), "{text}");
        }
        for text in others() {
            assert_eq!(Tags::parse(&format!("\"{text}\"")), of(&[]), "{text}");
        }
        for text in ["", " , ", "a", "\"a", "\"a\"b", "\"a\" \"b\"", "*, \"a\"", "W/a", &format!("W/{ID}.4")]
        {
            assert_eq!(Tags::parse(text), None, "{text}");
        }
        assert!(Tags::Any.name(tag(1)) && Tags::Of(vec![tag(4)]).name(tag(4)));
        assert!(!Tags::Of(vec![tag(4)]).name(tag(5)) && !Tags::default().name(tag(4)));
    }
}

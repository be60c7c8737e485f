//! The token that names a state of a person, as person-api gives it with a write.

use std::{fmt, str::FromStr};

use uuid::Uuid;

/// Which life of a cpf, and which version of it: `"<person id>.<version>"`, an `ETag` with its quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) person: Uuid,
    pub(crate) version: i64,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}.{}\"", self.person, self.version)
    }
}

impl FromStr for Token {
    type Err = ();

    /// Takes it without its quotes too, and as weak as a proxy that compresses makes it (`W/"…"`).
    fn from_str(text: &str) -> Result<Self, ()> {
        let text = match text.strip_prefix("W/").unwrap_or(text).strip_prefix('"') {
            Some(quoted) => quoted.strip_suffix('"').ok_or(())?,
            None => text,
        };
        let (person, version) = text.split_once('.').ok_or(())?;
        // With hyphens: the only one of a UUID's spellings that anybody is given.
        if person.len() != 36 || !version.bytes().all(|b| b.is_ascii_digit()) {
            return Err(());
        }
        let person = Uuid::try_parse(person).map_err(|_| ())?;
        let version = version.parse().ok().filter(|version| *version > 0).ok_or(())?;
        Ok(Self { person, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0198c0de-0000-7000-8000-000000000001";

    #[test]
    fn every_spelling_that_somebody_is_given_is_the_same_token() {
        let token = Token { person: ID.parse().unwrap(), version: 4 };
        assert_eq!(token.to_string(), format!("\"{ID}.4\""));
        let upper = ID.to_uppercase();
        for text in [format!("{ID}.4"), token.to_string(), format!("W/{token}"), format!("{upper}.4")] {
            assert_eq!(text.parse(), Ok(token), "{text}");
        }
    }

    #[test]
    fn everything_else_is_none() {
        let simple = ID.replace('-', "");
        for text in [
            "",
            "\"",
            "\"\"",
            ".",
            ID,
            &format!("{ID}."),
            &format!("{ID}.0"),
            &format!("{ID}.-1"),
            &format!("{ID}.+1"),
            &format!("{ID}.1.1"),
            &format!("{ID}.1 "),
            &format!("{ID}.9223372036854775808"),
            &format!("\"{ID}.4"),
            &format!("{ID}.4\""),
            &format!("\"\"{ID}.4\"\""),
            &format!("W/{ID}.4"),
            &format!("w/\"{ID}.4\""),
            &format!("{simple}.4"),
            &format!("{{{simple}}}.4"),
            &format!("{}.4", ID.replace('0', "g")),
        ] {
            assert_eq!(text.parse::<Token>(), Err(()), "{text}");
        }
    }
}

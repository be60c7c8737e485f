//! Incarnations of a source: how they are spelled, and which of them a consumer takes.
//!
//! After a restore, or a failover that lost commits, a source begins a new incarnation. A consumer remembers the newest
//! one of each source. It takes a newer one only if that one follows it, and applies nothing of an earlier one.

/// A source in one of its incarnations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Incarnation<'a> {
    pub(crate) name: &'a str,
    pub(crate) number: i64,
}

/// What a consumer does with events of an incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is the newest one.
    Same,
    /// It follows the newest one, and becomes the newest one.
    Newer,
    /// A later one has begun.
    Superseded,
    /// It is newer, and does not follow the newest one.
    Unrelated,
}

impl<'a> Incarnation<'a> {
    /// Reads `shop` (the first incarnation) or `shop~2`. None when it is spelled in another way.
    pub(crate) fn parse(source: &'a str) -> Option<Self> {
        let Some((name, digits)) = source.split_once('~') else {
            return Some(Self { name: source, number: 1 });
        };
        let canonical = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
        let number = digits.parse().ok().filter(|number| *number >= 2 && canonical)?;
        (!name.is_empty()).then_some(Self { name, number })
    }

    /// What becomes of its events where `newest` is the newest one. `parent` is the one that it follows.
    pub(crate) fn standing(self, newest: i64, parent: Option<i64>) -> Standing {
        match self.number {
            number if number == newest => Standing::Same,
            number if number < newest => Standing::Superseded,
            _ if parent == Some(newest) => Standing::Newer,
            _ => Standing::Unrelated,
        }
    }
}

/// A source's name without its incarnation.
pub(crate) fn name(source: &str) -> &str {
    source.split_once('~').map_or(source, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_name_or_a_name_and_a_number() {
        let table = [
            ("shop", Some(("shop", 1))),
            ("shop~2", Some(("shop", 2))),
            ("shop~1764426123456", Some(("shop", 1_764_426_123_456))),
            ("shop~9223372036854775807", Some(("shop", i64::MAX))),
            ("shop~9223372036854775808", None),
            ("shop~1", None),
            ("shop~0", None),
            ("shop~02", None),
            ("shop~+2", None),
            ("shop~-2", None),
            ("shop~", None),
            ("shop~2~3", None),
            ("shop~two", None),
            ("~2", None),
        ];
        for (source, expected) in table {
            let parsed = Incarnation::parse(source).map(|one| (one.name, one.number));
            assert_eq!(parsed, expected, "{source:?}");
        }
    }

    #[test]
    fn a_newer_incarnation_is_taken_if_it_follows_the_newest() {
        let table = [
            (5, None, Standing::Same),
            (5, Some(3), Standing::Same),
            (4, Some(5), Standing::Superseded),
            (1, None, Standing::Superseded),
            (9, Some(5), Standing::Newer),
            (9, Some(3), Standing::Unrelated),
            (9, Some(8), Standing::Unrelated),
            (9, None, Standing::Unrelated),
        ];
        for (number, parent, expected) in table {
            let standing = Incarnation { name: "shop", number }.standing(5, parent);
            assert_eq!(standing, expected, "{number} after {parent:?}, where 5 is the newest");
        }
    }
}

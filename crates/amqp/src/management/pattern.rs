//! Routing keys word by word: a pattern of a topic binding, or a key that has to be the same.

/// A part of a pattern, between two dots.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// This word.
    Word(String),
    /// `*`: any one word.
    One,
    /// `#`: any number of words.
    Any,
}

/// A pattern, as an automaton whose states are the places between its parts.
#[derive(Clone, Debug)]
pub(super) struct Pattern(Vec<Part>);

/// Where a pattern can be after some words; in order.
pub(super) type Places = Vec<usize>;

impl Pattern {
    /// As a topic exchange reads it.
    pub(super) fn topic(text: &str) -> Self {
        let part = |word: &str| match word {
            "*" => Part::One,
            "#" => Part::Any,
            word => Part::Word(word.to_owned()),
        };
        Self(text.split('.').map(part).collect())
    }

    /// As a direct exchange reads it.
    pub(super) fn exactly(text: &str) -> Self {
        Self(text.split('.').map(|word| Part::Word(word.to_owned())).collect())
    }

    /// The words that it names.
    pub(super) fn words(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Word(word) => Some(word.as_str()),
            _ => None,
        })
    }

    /// Before the first word.
    pub(super) fn start(&self) -> Places {
        self.closed(vec![0])
    }

    /// After one more word.
    pub(super) fn after(&self, places: &[usize], word: &str) -> Places {
        let next = places.iter().filter_map(|place| match self.0.get(*place)? {
            Part::Any => Some(*place),
            Part::One => Some(place + 1),
            Part::Word(own) => (own == word).then_some(place + 1),
        });
        self.closed(next.collect())
    }

    /// Whether the words so far are all.
    pub(super) fn fits(&self, places: &[usize]) -> bool {
        places.contains(&self.0.len())
    }

    /// Whether all of a key's words fit.
    pub(super) fn matches(&self, key: &str) -> bool {
        let places = key.split('.').fold(self.start(), |places, word| self.after(&places, word));
        self.fits(&places)
    }

    /// `#` may be no word at all.
    fn closed(&self, mut places: Places) -> Places {
        let mut at = 0;
        while let Some(place) = places.get(at).copied() {
            if self.0.get(place) == Some(&Part::Any) && !places.contains(&(place + 1)) {
                places.push(place + 1);
            }
            at += 1;
        }
        places.sort_unstable();
        places.dedup();
        places
    }
}

//! The ids of the last events applied to an aggregate, by which a fork is recognized.

use uuid::Uuid;

/// How many are remembered.
const REMEMBERED: usize = 16;
/// How many bytes of each: two ids agree in them by chance once in four billion.
const BYTES: usize = 4;

/// The last ids, as hashes. The last one is of the version applied last, and each one before it of the version before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Recent(Vec<[u8; BYTES]>);

impl Recent {
    /// What is stored of a chain that the event `last` has brought to its version. A program that does not know the
    /// column advances the version without it; then only the last one is known.
    pub(crate) fn load(stored: Option<&[u8]>, last: Option<Uuid>) -> Self {
        let Some(last) = last.map(hash) else { return Self::default() };
        let stored = stored.unwrap_or_default().as_chunks::<BYTES>().0;
        if stored.last() == Some(&last) { Self(stored.to_vec()) } else { Self(vec![last]) }
    }

    /// As it is stored.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.concat()
    }

    /// The event `id` was applied. After a jump, the versions before it are unknown.
    pub(crate) fn push(&mut self, id: Uuid, jumped: bool) {
        if jumped {
            self.0.clear();
        }
        self.0.push(hash(id));
        let forgotten = self.0.len().saturating_sub(REMEMBERED);
        self.0.drain(..forgotten);
    }

    /// Whether another event than `id` is known to have been applied `before` versions before the last one.
    pub(crate) fn contradicts(&self, before: i64, id: Uuid) -> bool {
        let applied = usize::try_from(before).ok().and_then(|before| self.0.iter().rev().nth(before));
        applied.is_some_and(|applied| *applied != hash(id))
    }
}

/// All bytes of an id count, in whatever way it was made.
fn hash(id: Uuid) -> [u8; BYTES] {
    let (high, low) = id.as_u64_pair();
    let mixed = high.rotate_left(29) ^ low;
    let folded = mixed ^ mixed >> 32;
    let [.., a, b, c, d] = folded.to_be_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> Uuid {
        Uuid::from_u128(n << 64 | n)
    }

    #[test]
    fn the_last_sixteen_are_known() {
        let mut recent = Recent::default();
        for n in 1..=20 {
            recent.push(id(n), false);
        }
        for (before, n) in (0..16).zip((5..=20).rev()) {
            assert!(!recent.contradicts(before, id(n)) && recent.contradicts(before, id(n + 1)), "{n}");
        }
        assert!(!recent.contradicts(16, id(99)), "unknown is no contradiction");
        assert_eq!(recent.bytes().len(), 64);
        let stored = Recent::load(Some(&recent.bytes()), Some(id(20)));
        assert_eq!(stored, recent);
    }

    #[test]
    fn what_was_jumped_over_is_unknown_and_so_is_what_another_program_applied() {
        let mut recent = Recent::default();
        recent.push(id(1), false);
        recent.push(id(7), true);
        assert!(recent.contradicts(0, id(8)) && !recent.contradicts(1, id(8)));

        let stale = Recent::load(Some(&recent.bytes()), Some(id(9)));
        assert!(stale.contradicts(0, id(7)) && !stale.contradicts(1, id(8)));
        assert_eq!(Recent::load(None, None), Recent::default());
    }
}

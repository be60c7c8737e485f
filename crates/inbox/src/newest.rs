//! The newest incarnation of each source of a transaction, and what becomes of its messages by it.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{Postgres, Transaction};

use crate::{
    Event,
    incarnation::{Incarnation, Standing, name},
    parsed::ParsedMessage,
    rejection::Rejection,
    rollback::Rollback,
    work::Work,
};

/// Why a message is not taken.
pub(crate) type Refusal = (Rejection, String);

/// The newest incarnations of the sources of a transaction, whose rows it has locked.
#[derive(Debug)]
pub(crate) struct Newest<'a> {
    consumer: &'a str,
    of: BTreeMap<String, i64>,
    /// The rows are locked for this transaction alone, so they may change.
    exclusive: bool,
    /// The sources that go on to another incarnation, each with the one before it and the new one.
    pub(crate) taken: BTreeMap<String, (i64, i64)>,
}

impl<'a> Newest<'a> {
    /// Locks the rows of the sources that the work is of: shared with other transactions, unless a row has to change.
    pub(crate) async fn lock(
        tx: &mut Transaction<'_, Postgres>,
        consumer: &'a str,
        work: Work<'_>,
    ) -> sqlx::Result<Self> {
        let mut first: BTreeMap<&str, i64> = BTreeMap::new();
        let received = events(work.messages).map(|event| &*event.source);
        for source in received.chain(work.resume.iter().map(|key| &*key.source)) {
            if let Some(Incarnation { name, number }) = Incarnation::parse(source) {
                first.entry(name).or_insert(number);
            }
        }
        let mut newest =
            Self { consumer, of: BTreeMap::new(), exclusive: work.exclusive, taken: BTreeMap::new() };
        if first.is_empty() {
            return Ok(newest);
        }
        if work.exclusive {
            newest.make(tx, &first).await?;
        }
        newest.read(tx, first.into_keys().collect()).await?;
        Ok(newest)
    }

    /// Locks the row of one source, shared with other transactions.
    pub(crate) async fn of(
        tx: &mut Transaction<'_, Postgres>,
        consumer: &'a str,
        source: &str,
    ) -> sqlx::Result<Self> {
        let mut newest = Self { consumer, of: BTreeMap::new(), exclusive: false, taken: BTreeMap::new() };
        newest.read(tx, vec![name(source)]).await?;
        Ok(newest)
    }

    /// Makes the missing rows. The first incarnation that comes is taken, whatever it is.
    async fn make(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        first: &BTreeMap<&str, i64>,
    ) -> sqlx::Result<()> {
        sqlx::query(
            "INSERT INTO inbox.source (consumer, name, incarnation)
             SELECT $1, k.name, k.incarnation FROM unnest($2::text[], $3::bigint[]) AS k (name, incarnation)
             ORDER BY k.name
             ON CONFLICT DO NOTHING",
        )
        .bind(self.consumer)
        .bind(first.keys().copied().collect::<Vec<_>>())
        .bind(first.values().copied().collect::<Vec<_>>())
        .execute(&mut **tx)
        .await?;
        Ok(())
    }

    async fn read(&mut self, tx: &mut Transaction<'_, Postgres>, names: Vec<&str>) -> sqlx::Result<()> {
        const SHARED: &str =
            "SELECT name, incarnation FROM inbox.source WHERE consumer = $1 AND name = ANY ($2)
                              ORDER BY name FOR SHARE";
        const EXCLUSIVE: &str =
            "SELECT name, incarnation FROM inbox.source WHERE consumer = $1 AND name = ANY ($2)
                                 ORDER BY name FOR UPDATE";
        let rows: Vec<(String, i64)> = sqlx::query_as(if self.exclusive { EXCLUSIVE } else { SHARED })
            .bind(self.consumer)
            .bind(names)
            .fetch_all(&mut **tx)
            .await?;
        self.of = rows.into_iter().collect();
        Ok(())
    }

    /// Whether a later incarnation of this source has begun.
    pub(crate) fn supersedes(&self, source: &str) -> bool {
        let known = Incarnation::parse(source).and_then(|one| Some((one, *self.of.get(one.name)?)));
        known.is_some_and(|(one, newest)| one.standing(newest, None) == Standing::Superseded)
    }

    /// What is not taken of `messages`, one entry for each, in their order.
    ///
    /// Fails when events of two incarnations of a source would be applied. Each part of the messages is then tried by
    /// itself, so one transaction knows one incarnation of a source.
    pub(crate) fn refuse(
        &mut self,
        messages: &[ParsedMessage<'_>],
    ) -> Result<Vec<Option<Refusal>>, Rollback> {
        let mut accepted = BTreeSet::new();
        messages
            .iter()
            .map(|message| match message.event.as_ref() {
                Ok(event) => self.refuse_one(event, &mut accepted),
                Err(_) => Ok(None),
            })
            .collect()
    }

    fn refuse_one<'e>(
        &mut self,
        event: &'e Event,
        accepted: &mut BTreeSet<&'e str>,
    ) -> Result<Option<Refusal>, Rollback> {
        // Whatever else is spelled there is malformed.
        let Some(one) = Incarnation::parse(&event.source) else { return Ok(None) };
        let Some(newest) = self.of.get_mut(one.name) else { return Err(Rollback::NewIncarnation) };
        let refused = match one.standing(*newest, event.source_parent()) {
            Standing::Same => None,
            Standing::Newer if accepted.contains(one.name) => {
                return Err(Rollback::Failed("a new incarnation begins among the messages".to_owned()));
            }
            Standing::Newer if !self.exclusive => return Err(Rollback::NewIncarnation),
            Standing::Newer => {
                let before = std::mem::replace(newest, one.number);
                self.taken.insert(one.name.to_owned(), (before, one.number));
                None
            }
            Standing::Superseded => Some((Rejection::Superseded, superseded(one.name, *newest))),
            Standing::Unrelated => Some((Rejection::Unrelated, unrelated(one.name, *newest))),
        };
        if refused.is_none() {
            accepted.insert(one.name);
        }
        Ok(refused)
    }

    /// Stores the incarnations that were taken.
    pub(crate) async fn store(&self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        if self.taken.is_empty() {
            return Ok(());
        }
        let incarnations: Vec<i64> = self.taken.values().map(|(_, now)| *now).collect();
        sqlx::query(
            "UPDATE inbox.source s
             SET earlier = s.earlier || s.incarnation, incarnation = k.incarnation, taken_at = now()
             FROM unnest($2::text[], $3::bigint[]) AS k (name, incarnation)
             WHERE s.consumer = $1 AND s.name = k.name",
        )
        .bind(self.consumer)
        .bind(self.taken.keys().collect::<Vec<_>>())
        .bind(incarnations)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }
}

/// The events among messages.
pub(crate) fn events<'m>(messages: &'m [ParsedMessage<'_>]) -> impl Iterator<Item = &'m Event> {
    messages.iter().filter_map(|message| message.event.as_ref().ok())
}

fn superseded(name: &str, newest: i64) -> String {
    format!("the source {name:?} has begun incarnation {newest}")
}

fn unrelated(name: &str, newest: i64) -> String {
    format!(
        "it does not follow incarnation {newest} of the source {name:?}, the newest one known here. Find out whose events \
         these are. If they are right, begin a new incarnation of the source above {newest}"
    )
}

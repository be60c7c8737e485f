//! The procedure of `docs/operating/back-in-time.md`, as an operator carries it out: each command as it is printed there.

use std::{io::Write, time::Duration};

use anyhow::{Context, bail, ensure};
use devstack::binary::find;
use sqlx::Connection;
use tokio::{process::Command, time::Instant};

use super::retry::until_done;
use crate::{
    event::{MEMO, NOTE, UNPUBLISHABLE},
    testbed::Testbed,
};

/// How long a step may need, however often: another fault may take away the broker or a relay meanwhile.
const STEP_TIMEOUT: Duration = Duration::from_mins(5);
/// How long one command may take before it is ended and repeated. `recover` waits half a minute for the relay, and as long for the subscriber.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(100);
/// The pause before a step is repeated.
const PAUSE: Duration = Duration::from_millis(500);

/// An operator after a lost time.
pub(super) struct Recovery<'a> {
    pub(super) testbed: &'a Testbed,
    /// The database of scores went back as well.
    pub(super) both: bool,
}

/// What a command said, and its exit code.
struct Said {
    code: Option<i32>,
    text: String,
}

impl Said {
    fn has(&self, code: i32, text: &str) -> bool {
        self.code == Some(code) && self.text.contains(text)
    }
}

impl Recovery<'_> {
    /// All of it, to the last check.
    pub(super) async fn carry_out(&self) -> anyhow::Result<()> {
        self.persons().await.context("case 1, the service of persons")?;
        if self.both {
            // Everything was just republished, so this finds nothing missing.
            self.until("person", "outbox-relay digest --consumer score", |said| said.has(0, "")).await?;
            self.scores().await.context("case 3, the service of scores")?;
        }
        for check in [
            "outbox-relay recover --consumer score",
            "outbox-relay digest --consumer score",
            "score-projector verify",
        ] {
            self.until("person", check, |said| said.has(0, "")).await.context("the last check")?;
        }
        Ok(())
    }

    /// A writing service lost commits, and `score` subscribes to it.
    async fn persons(&self) -> anyhow::Result<()> {
        self.until("person", "outbox-relay recover", |said| said.has(3, "--yes")).await?;
        let begun =
            |said: &Said| !said.text.contains("next  relay") && said.text.contains("publishes as person~");
        self.until("person", "outbox-relay recover --consumer score --yes", begun).await?;
        let republish = self.until("person", "person-api republish --all", |said| said.has(0, ""));
        self.testbed.barrier.republishing(republish).await?;
        self.notes().await?;
        self.lost_aggregates().await?;
        self.rejected().await
    }

    /// Steps 5 to 7: what the subscriber has of the lost time ends.
    async fn lost_aggregates(&self) -> anyhow::Result<()> {
        let end = Instant::now() + STEP_TIMEOUT;
        loop {
            let said = self.run("person", "outbox-relay recover --consumer score").await?;
            if said.has(0, "") {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("outbox-relay recover --consumer score ends with {:?}: {}", said.code, said.text);
            }
            if let Some(at) = said.text.find("outbox-relay recover --consumer score --lost")
                && let Some(line) = said.text.get(at..).and_then(|rest| rest.lines().next())
            {
                self.run("person", line).await?;
            } else {
                self.drop_unpublishable().await?;
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Step 8.
    async fn rejected(&self) -> anyhow::Result<()> {
        let newest: i64 = until_done(async || {
            let mut conn = self.testbed.addresses.connect("score").await?;
            let sql = "SELECT count(*) FROM inbox.rejected r JOIN inbox.source s USING (consumer)
                       WHERE r.reason = 'fork' AND s.name = 'person'
                         AND r.properties::jsonb ->> 'app_id' = inbox.spell(s.name, s.incarnation)";
            Ok(sqlx::query_scalar(sql).fetch_one(&mut conn).await?)
        })
        .await?;
        ensure!(newest == 0, "{newest} forks of the newest incarnation");
        drop_rejected(self.testbed).await
    }

    /// The service of scores lost commits, and publishes as well. Nobody keeps an inbox of scores.
    async fn scores(&self) -> anyhow::Result<()> {
        self.until("score", "outbox-relay recover", |said| said.has(3, "--yes")).await?;
        let begun =
            |said: &Said| !said.text.contains("next  relay") && said.text.contains("publishes as score~");
        self.until("score", "outbox-relay recover --yes", begun).await?;
        self.until("score", "score-projector republish --all", |said| said.has(0, "")).await?;
        let published = |said: &Said| said.has(3, "next  subscribers: not looked at");
        self.until("score", "outbox-relay recover", published).await.map(|_| ())
    }

    /// The other services that write to this outbox: a baseline of each note and memo, and the end of what was never
    /// published and never will be.
    async fn notes(&self) -> anyhow::Result<()> {
        until_done(async || {
            let mut tx = self.testbed.addresses.connect("person").await?;
            let mut tx = tx.begin().await?;
            for kind in [NOTE, MEMO] {
                sqlx::query(
                    "WITH note AS (
                         UPDATE public.note SET version = version + 1 WHERE kind = $1 RETURNING kind, id, version
                     )
                     INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
                     SELECT kind, id, version, 'note.baseline',
                            json_build_object('id', id, 'text', 'version ' || version), '{\"baseline\": true}'
                     FROM note",
                )
                .bind(kind)
                .execute(&mut *tx)
                .await?;
            }
            sqlx::query(
                "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 SELECT aggregate_type, aggregate_id, max(version) + 1, aggregate_type || '.deleted',
                        json_build_object('id', aggregate_id)
                 FROM outbox.event WHERE aggregate_type = $1
                 GROUP BY 1, 2 HAVING NOT bool_or(type = aggregate_type || '.deleted')",
            )
            .bind(UNPUBLISHABLE)
            .execute(&mut *tx)
            .await?;
            Ok(tx.commit().await?)
        })
        .await
    }

    /// What cannot be published was tried again under the new incarnation.
    async fn drop_unpublishable(&self) -> anyhow::Result<()> {
        let parked: Vec<String> = until_done(async || {
            let sql = "SELECT id::text FROM outbox.parked WHERE aggregate_type = $1 AND reason = 'refused'";
            let mut conn = self.testbed.addresses.connect("person").await?;
            Ok(sqlx::query_scalar(sql).bind(UNPUBLISHABLE).fetch_all(&mut conn).await?)
        })
        .await?;
        for id in parked {
            self.run("person", &format!("outbox-relay parked drop --id {id} --yes")).await?;
        }
        Ok(())
    }

    /// Repeats a command until it has `done` what it is for.
    async fn until(&self, database: &str, line: &str, done: impl Fn(&Said) -> bool) -> anyhow::Result<Said> {
        let end = Instant::now() + STEP_TIMEOUT;
        loop {
            let said = self.run(database, line).await?;
            if done(&said) {
                return Ok(said);
            }
            if Instant::now() > end {
                bail!("{line} ends with {:?}: {}", said.code, said.text);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn run(&self, database: &str, line: &str) -> anyhow::Result<Said> {
        run(self.testbed, database, line).await
    }
}

/// Drops what the subscriber has rejected because of the lost time, if there is any.
pub(crate) async fn drop_rejected(testbed: &Testbed) -> anyhow::Result<()> {
    for reason in ["fork", "superseded"] {
        let line = format!("score-projector rejected drop --reason {reason} --yes");
        until_done(async || {
            let Said { code, text } = run(testbed, "score", &line).await?;
            ensure!(code == Some(0), "{line} ends with {code:?}: {text}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Runs a line as the page prints it. `database` is that of the service; the projector's commands have their own.
async fn run(testbed: &Testbed, database: &str, line: &str) -> anyhow::Result<Said> {
    let mut words = line.split_whitespace();
    let program = words.next().context("a line without a program")?;
    let database = if program == "score-projector" { "score" } else { database };
    let addresses = &testbed.addresses;
    let mut command = Command::new(find(program)?);
    command
        .args(words)
        .env("DATABASE_URL", addresses.url(database))
        .env("INBOX_DATABASE_URL", addresses.url("score"))
        .env("AMQP_URL", &addresses.replay)
        .env("LOG", "off")
        .kill_on_drop(true);
    let began = Instant::now();
    let said = match tokio::time::timeout(COMMAND_TIMEOUT, command.output()).await {
        Ok(output) => {
            let output = output?;
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            Said { code: output.status.code(), text }
        }
        Err(_) => Said { code: None, text: format!("had not ended after {} s\n", COMMAND_TIMEOUT.as_secs()) },
    };
    let mut log =
        std::fs::File::options().create(true).append(true).open(testbed.logs().join("procedure.log"))?;
    let code = said.code.unwrap_or(-1);
    writeln!(
        log,
        "{database}: {line}\n{}exit code {code} after {:.1} s\n",
        said.text,
        began.elapsed().as_secs_f32()
    )?;
    Ok(said)
}

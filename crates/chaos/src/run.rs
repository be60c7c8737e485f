//! One run, from the start of the servers to the verdict.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    copy,
    field::Field,
    load::{CLIENTS, Load},
    nemesis,
    notes::Pen,
    oracle::{self, Evidence},
    quiet,
    report::{Numbers, Report},
    sabotage::Sabotage,
    settings::Settings,
    subscriber::Subscriber,
    verdict::Findings,
};

/// How long the programs may take to be ready at first.
const READY: Duration = Duration::from_mins(1);
/// How long the clients may take, once all faults are over, to learn what became of their writes.
const FINISH: Duration = Duration::from_mins(2);

/// What nobody listened to is tried again within a minute: when nothing has moved for longer, nothing will.
const STILL: Duration = Duration::from_secs(75);
/// The same, where it is known that something will never come.
const STILL_SABOTAGED: Duration = Duration::from_secs(20);

/// Runs it. What the programs and servers have said goes to the folder `logs`.
pub async fn run(settings: &Settings, logs: &Path, say: fn(&str)) -> anyhow::Result<Report> {
    let began = Instant::now();
    let without = match settings.sabotage {
        Some(guard) => {
            say("building the programs without a guard");
            Some(copy::build(&[guard]).await?)
        }
        None => None,
    };
    let field = Arc::new(Field::start(without.as_deref()).await?);
    let ran = Box::pin(on(&field, settings, say)).await;
    let kept = keep_logs(&field.logs(), logs);
    match Arc::into_inner(field) {
        Some(field) => field.stop().await,
        None => say("something is still at work; the guard ends it"),
    }
    kept.with_context(|| format!("the logs cannot be kept in {}", logs.display()))?;
    let mut report = ran?;
    report.numbers.seconds = began.elapsed().as_secs();
    Ok(report)
}

async fn on(field: &Arc<Field>, settings: &Settings, say: fn(&str)) -> anyhow::Result<Report> {
    let findings = Arc::new(Findings::default());
    // It is there before anybody publishes.
    let subscriber = Arc::new(Subscriber::new(&field.addresses.broker, Arc::clone(&findings)).await?);
    field.crew.start().await?;
    field.crew.ready(READY).await?;
    say("the programs are ready; it begins");

    let begin = Instant::now();
    let [stop, give_up, no_more_notes] = std::array::from_fn(|_| CancellationToken::new());
    let _ending = [stop.clone(), give_up.clone(), no_more_notes.clone()].map(CancellationToken::drop_guard);
    let (clients, pen) = settings.sabotage.map_or((CLIENTS, Pen::USUAL), Sabotage::load);
    let mut notes = JoinSet::new();
    for number in 0..pen.writers {
        let (addresses, stop) = (Arc::clone(&field.addresses), no_more_notes.clone());
        notes.spawn(pen.write(addresses, settings.seed.wrapping_add(number), stop));
    }
    let mut watching = JoinSet::new();
    watching.spawn({
        let (field, stop) = (Arc::clone(field), stop.clone());
        async move { field.crew.watch(&stop).await }
    });
    watching.spawn({
        let (subscriber, stop) = (Arc::clone(&subscriber), stop.clone());
        async move {
            subscriber.run(&stop).await;
            Ok(())
        }
    });

    let load = Load { clients, seed: settings.seed, end: begin + settings.length };
    let plan = settings.plan();
    let faults = async {
        let done = nemesis::carry_out(field, &plan, begin, say).await?;
        let (give_up, end) = (give_up.clone(), load.end.max(Instant::now()) + FINISH);
        tokio::spawn(async move {
            tokio::time::sleep_until(end).await;
            give_up.cancel();
        });
        anyhow::Ok(done)
    };
    let (history, done) = tokio::try_join!(load.run(&field.addresses, &findings, &give_up), faults)?;
    no_more_notes.cancel();
    while let Some(writer) = notes.join_next().await {
        writer?;
    }
    say("quiet: until everything has arrived");
    let quiet = Instant::now();
    let still = if settings.sabotage.is_some() { STILL_SABOTAGED } else { STILL };
    quiet::ready(field, still, say).await;
    quiet::arrived(field, &subscriber, still, say).await?;
    let quiet = quiet.elapsed();
    quiet::ready(field, still, say).await;
    stop.cancel();
    while let Some(watch) = watching.join_next().await {
        watch??;
    }

    let crew = field.crew.seen();
    let evidence =
        Evidence { history: &history, crew: &crew, subscriber: &subscriber, notes_aside: &done.notes_aside };
    let totals = oracle::judge(&field.addresses, evidence, &findings).await?;
    let memory = subscriber.memory();
    let numbers = Numbers::new(&history.told, &totals, &memory, quiet);
    Ok(Report::new(settings, done.counts, &crew, findings.all(), numbers))
}

fn keep_logs(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for log in std::fs::read_dir(from)? {
        let log = log?;
        std::fs::copy(log.path(), to.join(log.file_name()))?;
    }
    Ok(())
}

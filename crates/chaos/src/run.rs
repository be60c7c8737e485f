//! One run, from the start of the servers to the report.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    fault::Fault,
    nemesis::{self, Injected},
    oracle::{self, Observations},
    quiescence,
    report::{Numbers, Report},
    sabotage::{Sabotage, build},
    settings::Settings,
    subscriber::Subscriber,
    testbed::Testbed,
    violation::Violations,
    workload::{CLIENTS, Workload, sql_writers::SqlWriters},
};

/// How long the programs may take to be ready at the beginning.
const READY_TIMEOUT: Duration = Duration::from_mins(1);
/// How long the clients may take after the last fault to learn the outcome of their writes.
const FINISH_TIMEOUT: Duration = Duration::from_mins(2);

/// Without progress for this long, nothing more will arrive: the relay retries unroutable events within a minute.
const NO_PROGRESS: Duration = Duration::from_secs(75);
/// The same with sabotaged programs, where events are missing on purpose.
const NO_PROGRESS_SABOTAGED: Duration = Duration::from_secs(20);

/// Runs it, and copies the logs of programs and servers to the folder `logs`.
pub async fn run(settings: &Settings, logs: &Path, say: fn(&str)) -> anyhow::Result<Report> {
    let began = Instant::now();
    let sabotaged = match settings.sabotage {
        Some(guard) => {
            say("building the programs without a guard");
            Some(build::build(&[guard]).await?)
        }
        None => None,
    };
    let testbed = Arc::new(Testbed::start(sabotaged.as_deref()).await?);
    let ran = Box::pin(run_on(&testbed, settings, say)).await;
    let kept = keep_logs(&testbed.logs(), logs);
    match Arc::into_inner(testbed) {
        Some(testbed) => testbed.stop().await,
        None => say("a task has not ended; the cleanup process ends what is left"),
    }
    kept.with_context(|| format!("the logs cannot be kept in {}", logs.display()))?;
    let mut report = ran?;
    report.numbers.seconds = began.elapsed().as_secs();
    Ok(report)
}

async fn run_on(testbed: &Arc<Testbed>, settings: &Settings, say: fn(&str)) -> anyhow::Result<Report> {
    let violations = Arc::new(Violations::default());
    // Its queue exists before the first event is published.
    let subscriber = Arc::new(Subscriber::new(&testbed.addresses.broker, Arc::clone(&violations)).await?);
    testbed.supervisor.start().await?;
    testbed.supervisor.ready(READY_TIMEOUT).await?;
    say("the programs are ready: the faults begin");

    let begin = Instant::now();
    let [stop, give_up, stop_sql_writers] = std::array::from_fn(|_| CancellationToken::new());
    let _ending =
        [stop.clone(), give_up.clone(), stop_sql_writers.clone()].map(CancellationToken::drop_guard);
    let (clients, sql_writers) = settings.sabotage.map_or((CLIENTS, SqlWriters::USUAL), Sabotage::load);
    let plan = settings.plan();
    let replacements = plan.iter().filter(|fault| matches!(fault.fault, Fault::Restored | Fault::FailedOver));
    let writers = usize::try_from(clients + sql_writers.writers)?;
    testbed.barrier.expect(writers, replacements.count());
    let mut sql_writing = JoinSet::new();
    for number in 0..sql_writers.writers {
        let shared = (Arc::clone(&testbed.addresses), Arc::clone(&testbed.barrier));
        let stop = stop_sql_writers.clone();
        sql_writing.spawn(sql_writers.write(shared, settings.seed.wrapping_add(number), stop));
    }
    let mut watching = JoinSet::new();
    watching.spawn({
        let (testbed, stop) = (Arc::clone(testbed), stop.clone());
        async move { testbed.supervisor.watch(&stop).await }
    });
    watching.spawn({
        let (subscriber, stop) = (Arc::clone(&subscriber), stop.clone());
        async move {
            subscriber.run(&stop).await;
            Ok(())
        }
    });

    let workload = Workload { clients, seed: settings.seed, end: begin + settings.length };
    let faults = async {
        let injected = nemesis::carry_out(testbed, &plan, begin, &violations, say).await?;
        let (give_up, end) = (give_up.clone(), workload.end.max(Instant::now()) + FINISH_TIMEOUT);
        tokio::spawn(async move {
            tokio::time::sleep_until(end).await;
            give_up.cancel();
        });
        anyhow::Ok(injected)
    };
    let shared = (&testbed.addresses, &testbed.barrier);
    let (mut history, injected) = tokio::try_join!(workload.run(shared, &violations, &give_up), faults)?;
    let Injected { counts, parked_notes, losses, forgotten } = injected;
    history.merge(forgotten);
    stop_sql_writers.cancel();
    while let Some(writer) = sql_writing.join_next().await {
        writer?;
    }
    say("the faults are over: waiting until everything has arrived");
    let quiet = Instant::now();
    let no_progress = if settings.sabotage.is_some() { NO_PROGRESS_SABOTAGED } else { NO_PROGRESS };
    quiescence::ready(testbed, no_progress, say).await;
    quiescence::arrived(testbed, &subscriber, no_progress, say).await?;
    let quiet = quiet.elapsed();
    if !losses.is_empty() {
        nemesis::drop_rejected(testbed).await?;
    }
    quiescence::ready(testbed, no_progress, say).await;
    stop.cancel();
    while let Some(watch) = watching.join_next().await {
        watch??;
    }

    let health = testbed.supervisor.health();
    let observations = Observations {
        history: &history,
        health: &health,
        subscriber: &subscriber,
        parked_notes: &parked_notes,
        losses: &losses,
    };
    let totals = oracle::check(&testbed.addresses, observations, &violations).await?;
    let deliveries = subscriber.deliveries();
    let numbers = Numbers::new(&history, &totals, &deliveries, quiet);
    Ok(Report::new(settings, counts, &health, violations.all(), numbers))
}

fn keep_logs(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for log in std::fs::read_dir(from)? {
        let log = log?;
        std::fs::copy(log.path(), to.join(log.file_name()))?;
    }
    Ok(())
}

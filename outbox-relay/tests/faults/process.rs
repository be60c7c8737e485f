//! The relay itself is killed at each step, stopped, and has its clock turned.

use std::{os::unix::process::ExitStatusExt, path::PathBuf, time::Duration};

use lapin::types::FieldTable;
use tokio::{process::Command, time::sleep};

use crate::{
    field::{Field, QUEUE, UNSTORED, WHILE},
    stack::eventually,
};

/// SIGKILL between any two steps of an event's way: the next process goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn killed_at_each_step() {
    let mut field = Field::new("faults_steps").await;
    for (step, times) in [
        ("read", 1),
        ("read", 20),
        ("publish", 1),
        ("publish", 20),
        ("confirm", 1),
        ("confirm", 20),
        ("save", 1),
        ("save", 5),
    ] {
        let fault = format!("killed at {step}, passage {times}");
        let load = field.load();
        let failpoint = format!("{step}={}*off->return", times - 1);
        dies(field.run().env("FAILPOINTS", failpoint), &fault).await;
        field.add(&mut field.run()).await;
        sleep(WHILE).await;
        load.stop().await;
        field.whole(&fault, UNSTORED).await;
        field.relays.pop().unwrap().kill().await;
    }

    // Between setting aside and settling, some events being routable and some not.
    let fault = "killed at park, passage 1";
    field.stack.bind(QUEUE, "thing.changed", FieldTable::default()).await;
    field.unbind("%23").await;
    let load = field.load();
    let lonely = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                  SELECT 'thing', 'lonely' || n, 1, 'thing.lonely', '{}' FROM generate_series(1, 20) n";
    sqlx::query(lonely).execute(&field.stack.writer).await.unwrap();
    dies(field.run().env("FAILPOINTS", "park=return"), fault).await;
    field.add(&mut field.run()).await;
    eventually("the lonely ones are set aside", async || {
        let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox.parked");
        (count.fetch_one(&field.stack.admin).await.unwrap() == 20).then_some(())
    })
    .await;
    field.stack.bind(QUEUE, "#", FieldTable::default()).await;
    load.stop().await;
    field.whole(fault, UNSTORED).await;
    field.end().await;
}

/// Runs a relay that kills itself.
async fn dies(run: &mut Command, fault: &str) {
    let mut child = run.env("LISTEN", "127.0.0.1:0").spawn().unwrap();
    let ended = tokio::time::timeout(Duration::from_mins(1), child.wait()).await;
    let ended = ended.unwrap_or_else(|_| panic!("{fault}: it never came by")).unwrap();
    assert_eq!(ended.signal(), Some(9), "{fault}: {ended}");
}

/// Three relays, of which one is killed, or stopped and woken up, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn one_of_three() {
    let mut field = Field::new("faults_three").await;
    let run = |field: &Field| {
        let mut run = field.run();
        run.env("LEASE", "2s");
        run
    };
    for _ in 0..3 {
        field.add(&mut run(&field)).await;
    }
    let fault = "relays killed and stopped";
    let load = field.load();
    for round in 0..12 {
        sleep(WHILE).await;
        let first = field.relays.remove(0);
        if round % 2 == 0 {
            first.kill().await;
            field.add(&mut run(&field)).await;
        } else {
            // Longer than its lease, with its connections open; then it wakes up amid what it was doing.
            first.signal("STOP").await;
            sleep(3 * WHILE).await;
            first.signal("CONT").await;
            field.relays.push(first);
        }
    }
    load.stop().await;
    field.whole(fault, 12 * UNSTORED).await;
    let epoch: i64 =
        sqlx::query_scalar("SELECT epoch FROM outbox.relay").fetch_one(&field.stack.admin).await.unwrap();
    assert!(epoch >= 6, "leadership changed hands: {epoch}");
    field.end().await;
}

/// The wall clock jumps back by an hour and ahead by two: leases do not hang on it, and no delay is
/// measured as less than nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn the_clock_jumps() {
    let mut field = Field::new("faults_clock").await;
    let clock = Clock::new(&field).await;
    field.add(clock.before(&mut field.run())).await;
    field.add(clock.before(&mut field.run())).await;
    let leader = async |field: &Field| -> (i64, String) {
        let row = sqlx::query_as("SELECT epoch, leader FROM outbox.relay");
        row.fetch_one(&field.stack.admin).await.unwrap()
    };
    let before = leader(&field).await;
    let fault = "the clock jumps";
    let load = field.load();
    for seconds in [-3_600_i64, 3_600, 0] {
        sleep(WHILE).await;
        clock.set(seconds);
        sleep(3 * WHILE).await;
    }
    load.stop().await;
    field.whole(fault, 0).await;
    assert_eq!(leader(&field).await, before, "nobody lost its leadership over it");
    // The delay is what the wall clock says since the writer's transaction.
    let mut delay = 0.0_f64;
    for relay in &field.relays {
        let sum = relay.metric("outbox_relay_delay_seconds_sum").await;
        delay = sum.map_or(0.0, |sum| sum.parse::<f64>().unwrap()).max(delay);
    }
    assert!(delay > 3_600.0, "no relay's clock did jump: {delay} s in all");
    field.end().await;
}

/// A wall clock that can be set: a library that is loaded before libc and adds to what it tells.
struct Clock {
    library: PathBuf,
    offset: PathBuf,
}

impl Clock {
    async fn new(field: &Field) -> Self {
        let folder = field.folder.path();
        let clock = Self { library: folder.join("clock.so"), offset: folder.join("offset") };
        clock.set(0);
        let source = folder.join("clock.c");
        std::fs::write(&source, include_str!("clock.c")).unwrap();
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&clock.library).arg(&source);
        assert!(compile.status().await.unwrap().success(), "the clock was not compiled");
        clock
    }

    /// Puts it before the program's own.
    fn before<'a>(&self, program: &'a mut Command) -> &'a mut Command {
        program.env("LD_PRELOAD", &self.library).env("CLOCK_OFFSET", &self.offset)
    }

    /// Sets it so many seconds ahead of the machine's.
    fn set(&self, seconds: i64) {
        let new = self.offset.with_extension("new");
        std::fs::write(&new, seconds.to_string()).unwrap();
        std::fs::rename(new, &self.offset).unwrap();
    }
}

//! Reads that ask for a write: what they are answered, and that no read misses it.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::{
    answers::join,
    support::{Answer, DEADLINE, Database, Program, Wire, apply, id},
};

/// A read of a life's cpf that asks for a version of it.
fn read(life: u32, version: i64, wait: &str) -> String {
    format!("/{life}/score?after={}.{version}&wait={wait}", id(life))
}

fn problem(answer: &Answer) -> serde_json::Value {
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

fn assert_behind(answer: &Answer, asked: i64, has: Option<i64>) {
    let problem = problem(answer);
    let expected = ("/problems/not-there-yet", Some(asked), has);
    let said = (problem["type"].as_str().unwrap(), problem["asked"].as_i64(), problem["has"].as_i64());
    assert_eq!((answer.status, said), (503, expected), "{answer}");
}

#[tokio::test]
async fn a_read_says_what_it_has_to_contain() {
    let mut database = Database::migrated().await;
    database.person(11111, 1, 1, 4, "4970").await;
    database.inbox("score", "person", "person", 1, 4).await;
    // Has ended.
    database.inbox("score", "person", "person", 2, 7).await;
    // Nothing of them has been applied: their first event is held.
    database.inbox("score", "person", "person", 3, 0).await;
    let program = Program::ready(&database.url()).await;
    let [one, two, three, nobody] = [1, 2, 3, 4].map(id);
    let with = [("If-None-Match", "\"0198c0de-0000-7000-8000-000000000001.4\"")];
    let behind = program.get(&format!("/11111/score?after={one}.5&wait=20ms")).await;
    assert!(problem(&behind)["waited_ms"].as_u64() >= Some(20), "{behind}");
    insta::assert_snapshot!(
        "asked",
        join(&[
            program.get(&format!("/11111/score?after={one}.4&wait=2s")).await,
            // As the header has it.
            program.get(&format!("/11111/score?after=%22{one}.3%22")).await,
            program.get(&format!("/11111/score?wait=0ms&after=W/%22{one}%2E4%22")).await,
            program.request("GET", &format!("/11111/score?after={one}.4"), &with).await,
            program.get(&format!("/22222/score?after={two}.7&wait=2s")).await,
            behind,
            program.get(&format!("/22222/score?after={two}.8")).await,
            program.get(&format!("/33333/score?after={three}.1&wait=1ms")).await,
            program.get(&format!("/44444/score?after={nobody}.1")).await,
            program.request("HEAD", &format!("/11111/score?after={one}.4"), &[]).await,
        ])
    );
    database.notify().await;
    let told = async {
        loop {
            let answer = program.get(&format!("/11111/score?after={one}.5")).await;
            if !problem(&answer)["last_applied_ms_ago"].is_null() {
                break answer;
            }
        }
    };
    let told = tokio::time::timeout(DEADLINE, told).await.expect("it listens");
    insta::assert_snapshot!(told, @r#"
    > GET /11111/score?after=0198c0de-0000-7000-8000-000000000001.5
    503
    cache-control: no-store
    connection: close
    content-length: [n]
    content-type: application/problem+json
    retry-after: 1

    {"type":"/problems/not-there-yet","title":"Not there yet","status":503,"detail":"The copy does not contain the version that `after` names, yet. Ask again; the copy follows within moments when all is well, and the version may be one that does not exist.","asked":5,"has":4,"waited_ms":[ms],"last_applied_ms_ago":[ms]}
    "#);
}

#[tokio::test]
async fn what_cannot_be_asked_is_a_problem() {
    let database = Database::migrated().await;
    let program = Program::ready_with(&database.url(), &["--max-wait", "1500ms"]).await;
    let token = format!("{}.4", id(1));
    insta::assert_snapshot!(
        "not_asked",
        join(&[
            program.get("/11111/score?after=").await,
            program.get("/11111/score?after=x&wait=soon").await,
            program.get(&format!("/11111/score?after={}", id(1))).await,
            program.get(&format!("/11111/score?after={}.0", id(1))).await,
            program.get(&format!("/11111/score?after={token}&wait=")).await,
            program.get(&format!("/11111/score?after={token}&wait=1")).await,
            program.get(&format!("/11111/score?after={token}&wait=-1s")).await,
            program.get(&format!("/11111/score?after={token}&wait=1501ms")).await,
            program.get("/11111/score?wait=1s").await,
            program.get("/abc/score?wait=").await,
            program.get(&format!("/11111/score?after={token}&after={token}")).await,
            program.get(&format!("/11111/score?after={token}&wait=1s&wait=1s")).await,
            program.get(&format!("/11111/score?after={token}&until=x&&")).await,
            program.get("/abc/score?After=x").await,
        ])
    );
}

/// What counts is the person of the token in the model that is live, and nothing that resembles it.
#[tokio::test]
async fn only_the_version_itself_is_an_answer() {
    let mut database = Database::migrated().await;
    let program = Program::ready(&database.url()).await;
    let ask = async |life, version| program.get(&read(life, version, "0s")).await;

    // Another life of the cpf, a score's own version, a model that is being rebuilt.
    database.person(1, 9, 1, 8, "10").await;
    database.inbox("score", "person", "person", 9, 8).await;
    database.inbox("score", "score", "score", 1, 8).await;
    database.inbox("shadow", "person", "person", 1, 8).await;
    assert_behind(&ask(1, 1).await, 1, None);
    sqlx::query("UPDATE score.model SET consumer = 'shadow'").execute(&mut database.admin).await.unwrap();
    // It is the other life's turn to be out of date.
    assert_behind(&program.get(&format!("/1/score?after={}.8", id(9))).await, 8, None);
    assert_eq!(ask(1, 8).await.status, 200, "contained, and so the newest life answers");
    assert_behind(&ask(1, 9).await, 9, Some(8));

    // A source that was restored counts again from what it had kept.
    database.inbox("shadow", "person", "person", 2, 100).await;
    database.inbox("shadow", "person~2", "person", 2, 95).await;
    database.inbox("shadow", "person~10", "person", 2, 91).await;
    assert_behind(&ask(2, 92).await, 92, Some(91));
    assert_eq!(ask(2, 91).await.status, 404);
    database.inbox("shadow", "person~11", "person", 2, 0).await;
    assert_behind(&ask(2, 91).await, 91, None);
}

#[tokio::test]
async fn a_read_waits_for_its_write() {
    let mut database = Database::migrated().await;
    let program = Program::ready_with(&database.url(), &["--max-wait", "50s"]).await;
    // Of somebody whom the read model has never seen; told by a notice.
    let created = program.asks(read(1, 1, "50s"));
    program.until_waiting(1).await;
    database.apply([(1, 1, true)]).await;
    database.notify().await;
    let created = created.await.unwrap();
    assert_eq!((created.status, &problem(&created)["version"]), (200, &1.into()), "{created}");
    // Nobody tells, and it is found all the same.
    let [changed, deleted] = [2, 4].map(|version| program.asks(read(1, version, "50s")));
    program.until_waiting(2).await;
    database.apply([(1, 2, true)]).await;
    assert_eq!(changed.await.unwrap().status, 200);
    // What is known for somebody who waits already does not answer whoever comes later.
    database.apply([(1, 3, true)]).await;
    assert_eq!(program.get(&read(1, 3, "0s")).await.status, 200);
    database.apply([(1, 4, false)]).await;
    assert_eq!(deleted.await.unwrap().status, 404);
}

/// Readers come before, with and after the writes that they ask for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_misses_its_write() {
    let database = Database::migrated().await;
    let program = Program::ready(&database.url()).await;
    let mut writers = tokio::task::JoinSet::new();
    for life in 1..=8 {
        let address = program.address;
        let mut conn = PgConnection::connect_with(&database.options).await.unwrap();
        writers.spawn(async move {
            for version in 1..=50 {
                let ask = || tokio::spawn(crate::support::get(address, read(life, version, "10s")));
                let before = ask();
                if version % 3 == 0 {
                    tokio::task::yield_now().await;
                }
                apply(&mut conn, [(life, version, version < 50)]).await;
                let after = ask();
                if version % 2 == 0 {
                    sqlx::query("NOTIFY score_model").execute(&mut conn).await.unwrap();
                }
                for answer in [before.await.unwrap(), after.await.unwrap()] {
                    if version == 50 {
                        assert_eq!(answer.status, 404, "{answer}");
                    } else {
                        assert_eq!(answer.status, 200, "{answer}");
                        assert_eq!(problem(&answer)["score"].as_i64(), Some(version), "{answer}");
                    }
                }
            }
        });
    }
    writers.join_all().await;
}

#[tokio::test]
async fn places_are_bounded_and_a_client_that_hangs_up_frees_its_own() {
    let mut database = Database::migrated().await;
    let settings = ["--max-waiters", "2", "--max-wait", "50s"];
    let program = Program::ready_with(&database.url(), &settings).await;
    let waiting = [1, 2].map(|life| program.asks(read(life, 1, "50s")));
    program.until_waiting(2).await;
    insta::assert_snapshot!(program.get(&read(3, 1, "50s")).await, @r#"
    > GET /3/score?after=0198c0de-0000-7000-8000-000000000003.1&wait=50s
    503
    cache-control: no-store
    connection: close
    content-length: 184
    content-type: application/problem+json
    retry-after: 1

    {"type":"/problems/too-many-waiters","title":"Too many waiters","status":503,"detail":"The limit of reads that wait for a write is reached. Try again later, or read without `after`."}
    "#);
    // What does not wait has a place of its own.
    assert_eq!(program.get("/3/score").await.status, 404);

    let [gone, stays] = waiting;
    gone.abort();
    program.until_waiting(1).await;
    let third = program.asks(read(3, 1, "50s"));
    program.until_waiting(2).await;
    database.apply([(2, 1, true), (3, 1, true)]).await;
    for answer in [stays, third] {
        let answer = answer.await.unwrap();
        assert_eq!(answer.status, 200, "{answer}");
    }
    program.until_waiting(0).await;
    let metrics = program.get("/metrics").await.body;
    let mut counted: Vec<_> = metrics.lines().filter(|line| line.contains("score_api_waits_total")).collect();
    counted.sort_unstable();
    insta::assert_snapshot!(counted.join("\n"), @r#"
    # HELP score_api_waits_total Reads that have waited for a write, by outcome.
    # TYPE score_api_waits_total counter
    score_api_waits_total{outcome="contained"} 2
    score_api_waits_total{outcome="defect"} 0
    score_api_waits_total{outcome="ending"} 0
    score_api_waits_total{outcome="hung_up"} 1
    score_api_waits_total{outcome="not_there_yet"} 0
    score_api_waits_total{outcome="too_many"} 1
    score_api_waits_total{outcome="unavailable"} 0
    "#);
    assert!(metrics.contains("score_api_wait_seconds_bucket"), "{metrics}");
    // Nobody waits, so nobody looks, whatever is told.
    let quiet = async {
        let mut same = 0;
        while same < 10 {
            let looks = program.metric("score_api_looks_total").await;
            database.notify().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            same = if program.metric("score_api_looks_total").await == looks { same + 1 } else { 0 };
        }
    };
    tokio::time::timeout(DEADLINE, quiet).await.expect("the looking ends");
}

#[tokio::test]
async fn sigterm_answers_those_who_wait() {
    let database = Database::migrated().await;
    let settings = ["--max-wait", "50s", "--drain-timeout", "1m"];
    let mut program = Program::ready_with(&database.url(), &settings).await;
    let waiting = program.asks(read(1, 1, "50s"));
    program.until_waiting(1).await;
    program.signal();
    insta::assert_snapshot!(waiting.await.unwrap(), @r#"
    > GET /1/score?after=0198c0de-0000-7000-8000-000000000001.1&wait=50s
    503
    cache-control: no-store
    connection: close
    content-length: 157
    content-type: application/problem+json
    retry-after: 1

    {"type":"/problems/shutting-down","title":"Shutting down","status":503,"detail":"This instance is shutting down. Try again, and another instance responds."}
    "#);
    assert_eq!(program.ended().await.code(), Some(0));
}

/// The sessions of the program, and of them those that listen.
async fn sessions(database: &mut Database) -> (i64, Vec<i32>) {
    let sql = "SELECT count(*), coalesce(array_agg(pid) FILTER (WHERE query ILIKE 'LISTEN%'), '{}')
               FROM pg_stat_activity WHERE usename = $1";
    sqlx::query_as(sql).bind(&database.role).fetch_one(&mut database.admin).await.unwrap()
}

#[tokio::test]
async fn whoever_waits_outlasts_a_lost_connection() {
    let mut database = Database::migrated().await;
    let mut wire = Wire::to(&database).await;
    let url = database.url_through(&wire.address.to_string());
    let program = Program::ready_with(&url, &["--max-wait", "50s"]).await;
    let [first, second, third] = [1, 2, 3].map(|version| program.asks(read(1, version, "50s")));
    program.until_waiting(3).await;

    // The listener alone, which is refused for a while and comes back.
    let listens = async {
        loop {
            match sessions(&mut database).await {
                (_, listeners) if listeners.is_empty() => tokio::time::sleep(Duration::from_millis(20)).await,
                (_, listeners) => break listeners,
            }
        }
    };
    let lost = tokio::time::timeout(DEADLINE, listens).await.expect("it listens");
    assert_eq!(lost.len(), 1);
    let login = format!("ALTER ROLE {} LOGIN", database.role);
    let no_login = login.replace("LOGIN", "NOLOGIN");
    sqlx::query(AssertSqlSafe(no_login)).execute(&mut database.admin).await.unwrap();
    sqlx::query("SELECT pg_terminate_backend($1)").bind(lost[0]).execute(&mut database.admin).await.unwrap();
    // Long enough for it to be refused.
    program.get(&read(1, 9, "300ms")).await;
    sqlx::query(AssertSqlSafe(login)).execute(&mut database.admin).await.unwrap();
    let back = async {
        loop {
            match &sessions(&mut database).await.1[..] {
                [pid] if *pid != lost[0] => break,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(DEADLINE, back).await.expect("it listens again");
    database.apply([(1, 1, true)]).await;
    assert_eq!(first.await.unwrap().status, 200);

    // All of them.
    wire.cut().await;
    let patient = program.asks(read(1, 2, "5s"));
    insta::assert_snapshot!(program.get(&read(1, 2, "1ms")).await, @r#"
    > GET /1/score?after=0198c0de-0000-7000-8000-000000000001.2&wait=1ms
    503
    cache-control: no-store
    connection: close
    content-length: 153
    content-type: application/problem+json
    retry-after: 1

    {"type":"/problems/unavailable","title":"Service unavailable","status":503,"detail":"The service cannot reach its database right now. Try again later."}
    "#);
    assert_eq!(problem(&patient.await.unwrap())["type"], "/problems/unavailable");
    wire.mend().await;
    database.apply([(1, 2, true)]).await;
    assert_eq!(second.await.unwrap().status, 200);
    database.apply([(1, 3, true)]).await;
    database.notify().await;
    assert_eq!(third.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_defect_while_waiting_shows_nothing_of_the_inside() {
    let mut database = Database::migrated().await;
    let program = Program::ready(&database.url()).await;
    sqlx::query("ALTER TABLE inbox.aggregate RENAME COLUMN version TO edition")
        .execute(&mut database.admin)
        .await
        .unwrap();
    let answer = program.get(&read(1, 1, "1ms")).await;
    assert_eq!((answer.status, &problem(&answer)["type"]), (500, &"/problems/internal".into()), "{answer}");
}

/// However many wait: one connection listens, and one query a wake-up looks for all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_wait_at_the_price_of_one() {
    const WAITERS: u32 = 5_000;
    const WAKES: u32 = 10;
    const EACH: u32 = 100;
    allow_files(u64::from(WAITERS) + 1_000);
    let mut database = Database::migrated().await;
    database.person(99_999, 99_999, 1, 4, "4970").await;
    let program = Program::ready_with(&database.url(), &["--max-wait", "50s"]).await;
    let before = program.footprint();
    let mut waiting = Vec::new();
    for life in 1..=WAITERS {
        waiting.push(program.asks(read(life, 1, "50s")));
        if life % 250 == 0 {
            program.until_waiting(life.into()).await;
        }
    }
    let full = program.footprint();
    let came = program.metric("score_api_looks_total").await;

    let (all, listeners) = sessions(&mut database).await;
    assert_eq!(listeners.len(), 1);
    assert!(all <= 11, "{all} sessions");
    assert_eq!(program.get("/99999/score").await.status, 200);

    for wake in 0..WAKES {
        let lives = 1 + wake * EACH..=(wake + 1) * EACH;
        database.apply(lives.map(|life| (life, 1, true))).await;
        database.notify().await;
        for answer in waiting.drain(..EACH as usize) {
            let answer = answer.await.unwrap();
            assert_eq!(answer.status, 200, "{answer}");
        }
    }
    let looks = program.metric("score_api_looks_total").await - came;
    // One for the notice; the others are the polling of a machine that is busy with the answers.
    assert!(looks <= u64::from(WAKES) * 10, "{looks} looks for {WAKES} wake-ups");

    eprintln!(
        "{came} looks while {WAITERS} came, {looks} for {WAKES} wake-ups; \
         files and KiB: {before:?} before, {full:?} with all"
    );
    // All of the others hang up.
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    program.until_waiting(0).await;
    let closed = async {
        while program.footprint().0 > before.0 + 20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, closed).await.expect("nothing stays open");
}

/// Files would run out first, and then nobody were answered any more.
#[tokio::test]
async fn fewer_wait_where_the_system_allows_few_files() {
    let database = Database::migrated().await;
    let few = Program::start_limited("ulimit -n 1219", &database.url()).await;
    few.until_ready().await;
    let _waiting = [1, 2, 3].map(|life| few.asks(read(life, 1, "10s")));
    few.until_waiting(3).await;
    let refused = few.get(&read(4, 1, "10s")).await;
    assert_eq!(problem(&refused)["type"], "/problems/too-many-waiters", "{refused}");

    // A limit that can be raised is raised.
    let program = Program::start_limited("ulimit -Sn 100", &database.url()).await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", program.child.id().unwrap())).unwrap();
    let limit: u64 = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok())
        .unwrap();
    assert!(limit > 100, "{limits}");
}

/// Each waiter has a socket on this side too.
fn allow_files(count: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < count) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum }).unwrap();
    }
}

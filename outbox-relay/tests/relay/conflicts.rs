//! What the server rolls back in favour of another transaction (a deadlock, a serialization failure) is tried again by
//! every command that writes.

use sqlx::{AssertSqlSafe, Executor};

use crate::stack::{Stack, output};

/// Statements fail like a deadlock's victim, then like a serialization failure, as often as was asked for. A sequence
/// counts what is rolled back, too.
const CONFLICTS: &str = "
    CREATE SEQUENCE public.conflicts MINVALUE 0;
    CREATE TABLE public.wanted (times bigint);
    INSERT INTO public.wanted VALUES (0);
    CREATE FUNCTION public.conflict() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    DECLARE n bigint := nextval('public.conflicts');
    BEGIN
        IF n < (SELECT times FROM public.wanted) THEN
            RAISE EXCEPTION 'another transaction is preferred'
                USING ERRCODE = CASE n % 2 WHEN 0 THEN '40P01' ELSE '40001' END;
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER conflict BEFORE UPDATE OR DELETE ON outbox.relay
        FOR EACH STATEMENT EXECUTE FUNCTION public.conflict();
    CREATE TRIGGER conflict BEFORE UPDATE OR DELETE ON outbox.parked
        FOR EACH STATEMENT EXECUTE FUNCTION public.conflict();
    CREATE TRIGGER conflict BEFORE UPDATE ON outbox.source
        FOR EACH STATEMENT EXECUTE FUNCTION public.conflict();
    CREATE TRIGGER conflict BEFORE UPDATE OR DELETE ON outbox.erasure
        FOR EACH STATEMENT EXECUTE FUNCTION public.conflict();
    CREATE TRIGGER conflict BEFORE TRUNCATE ON outbox.event_1
        FOR EACH STATEMENT EXECUTE FUNCTION public.conflict()";

async fn prefer_others(admin: &sqlx::PgPool, times: i64) {
    let sql = format!("UPDATE public.wanted SET times = {times}; ALTER SEQUENCE public.conflicts RESTART");
    admin.execute(AssertSqlSafe(sql)).await.unwrap();
}

/// How often a statement met another transaction's.
async fn met(admin: &sqlx::PgPool) -> i64 {
    let met = "SELECT CASE WHEN is_called THEN last_value + 1 ELSE 0 END FROM public.conflicts";
    sqlx::query_scalar(met).fetch_one(admin).await.unwrap()
}

#[tokio::test]
async fn every_command_tries_again() {
    let stack = Stack::new("conflicts").await;
    let admin = &stack.admin;
    let url = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let owner = format!("{url}/{}", stack.database_url.rsplit_once('/').unwrap().1);
    // A long history that is erased in part, what is set aside, and a first partition that is full and settled.
    stack.append(0..2_100, 1, &["thing.changed"]).await;
    sqlx::query("SELECT outbox.erase('{thing}', '{a0}', '{2101}')").execute(&stack.writer).await.unwrap();
    let used = "
        INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1000010, 1000010), ('old', 1000010, 1000010);
        INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, created_at,
                                   reason, detail)
        SELECT r.name, position, e.id, aggregate_type, aggregate_id, version, type, payload, created_at, 'refused', 'said'
        FROM outbox.event e, outbox.relay r WHERE position <= 2;
        SELECT outbox.add_partition(1000000), setval('outbox.position', 1000000)";
    admin.execute(used).await.unwrap();
    stack.append(2_100..2_105, 1, &["thing.changed"]).await;
    admin.execute(CONFLICTS).await.unwrap();
    // Notes when the partition was full.
    output(stack.command("prune").args(["--keep", "1d", "--dry-run"])).await;
    admin.execute("UPDATE outbox.partition_age SET full_since = now() - interval '2 days'").await.unwrap();

    for command in [
        "pause",
        "resume",
        "parked retry --all",
        "erasures --finish",
        "parked drop --all --yes",
        "forget old --yes",
        "prune --keep 1d --yes --without-baseline",
        "new-incarnation --yes",
    ] {
        let run = async || {
            let mut words = command.split_whitespace();
            let mut program = stack.command(words.next().unwrap());
            let program = program.args(words);
            if command.ends_with("--yes") && !command.starts_with("parked") {
                program.env("DATABASE_URL", &owner);
            }
            output(program).await
        };
        // As often as it is tried, and once more: the command fails, and has changed nothing.
        prefer_others(admin, 1_000).await;
        let failed = run().await;
        assert!(failed.starts_with("exit code: 1\n"), "{command}: {failed}");
        assert_eq!(met(admin).await, 6, "{command}: {failed}");
        prefer_others(admin, 3).await;
        let said = run().await;
        assert!(said.starts_with("exit code: 0\n"), "{command}: {said}");
        assert!(met(admin).await > 3, "{command} wrote nothing: {said}");
    }
    let (incarnation, relays, parked, first): (i64, i64, i64, i64) = sqlx::query_as(
        "SELECT incarnation, (SELECT count(*) FROM outbox.relay), (SELECT count(*) FROM outbox.parked),
                (SELECT count(*) FROM outbox.event_1) FROM outbox.source",
    )
    .fetch_one(admin)
    .await
    .unwrap();
    assert!(incarnation > 1, "{incarnation}");
    assert_eq!((relays, parked, first), (1, 0, 0));
}

/// What was dropped by hand and the note of it are one transaction: `trace` tells of both or of none.
#[tokio::test]
async fn what_is_dropped_is_noted() {
    let stack = Stack::new("conflicts_drop").await;
    stack.append(0..2, 2, &["thing.new"]).await;
    let aside = "
        INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 2, 2);
        INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, created_at,
                                   reason, detail)
        SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, created_at, 'refused', 'said'
        FROM outbox.event;
        CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE EXCEPTION 'not now' USING ERRCODE = '53100';
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON outbox.relay FOR EACH STATEMENT EXECUTE FUNCTION public.refuse()";
    stack.admin.execute(aside).await.unwrap();
    let said = output(stack.command("parked").args(["drop", "--all", "--yes"])).await;
    assert!(said.starts_with("exit code: 1\n") && said.contains("nothing was dropped"), "{said}");
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox.parked").fetch_one(&stack.admin).await.unwrap();
    assert_eq!(left, 2);
}

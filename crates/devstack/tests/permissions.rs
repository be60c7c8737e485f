//! What each program's role may do, and that it can do nothing else.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::process::Command;

use devstack::{
    binary::find,
    testing::{Roles, database},
};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// What the role `$1` may do with everything that this database has of ours, its own rights and everybody's.
const RIGHTS: &str = "
WITH schema AS (
    SELECT oid, nspname AS name FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
), relation AS (
    SELECT c.oid, format('%s.%s', s.name, c.relname) AS name, c.relkind AS kind
    FROM pg_class c JOIN schema s ON s.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S')
), may AS (
    SELECT 0 AS n, 'role' AS what, a.may
    FROM pg_roles r, LATERAL (VALUES (r.rolsuper, 'SUPERUSER'), (r.rolcreatedb, 'CREATEDB'),
                                     (r.rolcreaterole, 'CREATEROLE'), (r.rolreplication, 'REPLICATION'),
                                     (r.rolbypassrls, 'BYPASSRLS')) a (has, may)
    WHERE r.rolname = $1 AND a.has
    UNION ALL
    SELECT 0, 'role', 'member of ' || m.roleid::regrole FROM pg_auth_members m WHERE m.member = to_regrole($1)
    UNION ALL
    SELECT 1, 'database', p FROM unnest(ARRAY['CONNECT', 'CREATE', 'TEMPORARY']) p
    WHERE has_database_privilege($1, current_database(), p)
    UNION ALL
    SELECT 2, 'schema ' || s.name, p FROM schema s, unnest(ARRAY['USAGE', 'CREATE']) p
    WHERE has_schema_privilege($1, s.oid, p)
    UNION ALL
    SELECT 3, 'table ' || t.name, p
    FROM relation t, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']
                            -- PostgreSQL 17 brought it, and earlier ones refuse the word.
                            || CASE WHEN current_setting('server_version_num')::int >= 170000 THEN ARRAY['MAINTAIN'] END) p
    WHERE t.kind <> 'S' AND has_table_privilege($1, t.oid, p)
    UNION ALL
    SELECT 3, 'table ' || t.name, format('%s (%s)', p, string_agg(a.attname, ', ' ORDER BY a.attnum))
    FROM relation t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped,
         unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) p
    WHERE t.kind <> 'S' AND NOT has_table_privilege($1, t.oid, p) AND has_column_privilege($1, t.oid, a.attnum, p)
    GROUP BY t.name, p
    UNION ALL
    SELECT 4, 'sequence ' || q.name, p FROM relation q, unnest(ARRAY['SELECT', 'USAGE', 'UPDATE']) p
    -- The planner is free to ask in any order, and only a sequence can be asked.
    WHERE CASE WHEN q.kind = 'S' THEN has_sequence_privilege($1, q.oid, p) END
    UNION ALL
    SELECT 5, 'function ' || f.oid::regprocedure,
           CASE WHEN f.prosecdef THEN 'EXECUTE with its owner''s rights' ELSE 'EXECUTE' END
    FROM pg_proc f JOIN schema s ON s.oid = f.pronamespace
    WHERE has_function_privilege($1, f.oid, 'EXECUTE') AND has_schema_privilege($1, s.oid, 'USAGE')
)
SELECT what || ': ' || string_agg(may, ', ' ORDER BY may) FROM may GROUP BY n, what ORDER BY n, what";

/// A database with the schemas of one side, made by the programs' own commands.
struct Side {
    admin: String,
    conn: PgConnection,
}

impl Side {
    async fn new(name: &str) -> Self {
        let admin = database(name).await;
        let conn = PgConnection::connect(&admin).await.unwrap();
        let this = Self { admin, conn };
        let program = if name == "person" { "person-api" } else { "score-projector" };
        this.migrate(program, &[]);
        this.migrate("outbox-relay", &["--source", name]);
        this
    }

    fn migrate(&self, program: &str, options: &[&str]) {
        let mut command = Command::new(find(program).unwrap());
        let command = command.arg("migrate").args(options).env("DATABASE_URL", &self.admin);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    async fn rights(&mut self, role: &str) -> String {
        let rights: Vec<String> =
            sqlx::query_scalar(RIGHTS).bind(role).fetch_all(&mut self.conn).await.unwrap();
        rights.join("\n")
    }
}

const ROLES: [(&str, &[&str]); 2] = [
    ("person", &["person_api", "outbox_relay"]),
    ("score", &["score_projector", "score_api", "outbox_relay"]),
];

#[tokio::test]
async fn each_role_may_do_what_its_program_needs() {
    for (name, programs) in ROLES {
        let mut side = Side::new(name).await;
        let roles = Roles::make(&side.admin).await;
        for program in programs {
            let rights = side.rights(&roles.name(program)).await;
            insta::assert_snapshot!(format!("{program} in {name}"), rights);
        }
        // Nobody else has anything, and the script may be run again.
        let stranger = roles.name("stranger");
        side.conn.execute(AssertSqlSafe(format!("CREATE ROLE {stranger}"))).await.unwrap();
        assert_eq!(side.rights(&stranger).await, "schema public: USAGE", "in {name}");
        let before = side.rights(&roles.name(programs[0])).await;
        Roles::make(&side.admin).await;
        assert_eq!(side.rights(&roles.name(programs[0])).await, before);
    }
}

/// The options of `migrate` give the rights that the script gives.
#[tokio::test]
async fn the_options_of_migrate_grant_the_same() {
    for (name, programs) in ROLES {
        let (mut by_script, mut by_options) = (Side::new(name).await, Side::new(name).await);
        let (script, options) = (Roles::make(&by_script.admin).await, Roles::of(&by_options.admin));
        for program in programs {
            let role = options.name(program);
            by_options.conn.execute(AssertSqlSafe(format!("CREATE ROLE {role}"))).await.unwrap();
        }
        let [api, projector, score_api, relay] =
            ["person_api", "score_projector", "score_api", "outbox_relay"]
                .map(|program| options.name(program));
        if name == "person" {
            by_options.migrate("person-api", &["--grant-to", &api]);
            by_options.migrate(
                "outbox-relay",
                &["--source", name, "--grant-writer", &api, "--grant-relay", &relay],
            );
        } else {
            by_options.migrate("score-projector", &["--grant-to", &projector, "--grant-api", &score_api]);
            let granted = ["--source", name, "--grant-writer", &projector, "--grant-relay", &relay];
            by_options.migrate("outbox-relay", &granted);
        }
        for program in programs {
            let schemas = |rights: String| -> Vec<String> {
                let of_schemas = |line: &&str| !line.starts_with("role") && !line.starts_with("database");
                rights.lines().filter(of_schemas).map(str::to_owned).collect()
            };
            let expected = schemas(by_script.rights(&script.name(program)).await);
            assert_eq!(
                schemas(by_options.rights(&options.name(program)).await),
                expected,
                "{program} in {name}"
            );
        }
    }
}

/// A service's own database keeps what its other programs may rely on, and the script says what it changes.
#[tokio::test]
async fn a_database_of_others_is_changed_only_where_it_is_told() {
    let admin = database("foreign").await;
    let mut conn = PgConnection::connect(&admin).await.unwrap();
    let migrate = Command::new(find("outbox-relay").unwrap())
        .args(["migrate", "--source", "shop"])
        .env("DATABASE_URL", &admin)
        .output()
        .unwrap();
    assert!(migrate.status.success(), "{migrate:?}");
    let (_, name) = admin.rsplit_once('/').unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/permissions/roles.sql");
    let run = |setting: &str| {
        let settings = format!("-c roles.outbox_relay={name}_relay -c roles.writer={name}_orders {setting}");
        let output = Command::new("psql")
            .args(["-X", "-q", "-d", &admin, "-f", script])
            .env("PGOPTIONS", settings)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap().replace(name, "DATABASE");
        let lines = said.lines().filter_map(|line| line.split_once("roles.sql:")?.1.split_once(": "));
        lines.map(|(_, line)| line.to_owned() + "\n").collect::<String>()
    };
    let is_open = "SELECT EXISTS (SELECT FROM pg_namespace n, aclexplode(n.nspacl) a
                                  WHERE nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE')";
    conn.execute("GRANT CREATE ON SCHEMA public TO PUBLIC").await.unwrap();
    let mut said = vec![format!("# the first time\n{}", run("")), format!("# again\n{}", run(""))];
    assert!(sqlx::query_scalar::<_, bool>(is_open).fetch_one(&mut conn).await.unwrap());
    said.push(format!("# roles.public=revoke\n{}", run("-c roles.public=revoke")));
    assert!(!sqlx::query_scalar::<_, bool>(is_open).fetch_one(&mut conn).await.unwrap());
    said.push(format!("# roles.public=off\n{}", run("-c roles.public=off")));
    insta::assert_snapshot!(said.join("\n"), @"
    # the first time
    NOTICE:  created the role DATABASE_relay, without a password
    NOTICE:  the role DATABASE_relay has log_parameter_max_length = 0 now
    NOTICE:  the role DATABASE_relay has log_parameter_max_length_on_error = 0 now
    NOTICE:  the role DATABASE_relay has log_min_messages = log now
    NOTICE:  the role DATABASE_relay has log_error_verbosity = terse now
    NOTICE:  the role DATABASE_relay has log_min_error_statement = panic now
    NOTICE:  the role DATABASE_relay has auto_explain.log_min_duration = -1 now
    NOTICE:  the role DATABASE_relay may connect to the database DATABASE
    NOTICE:  the role DATABASE_relay has the rights of outbox.grant_relay
    NOTICE:  the role DATABASE_relay is a member of pg_read_all_stats
    NOTICE:  created the role DATABASE_orders, without a password
    NOTICE:  the role DATABASE_orders has log_parameter_max_length = 0 now
    NOTICE:  the role DATABASE_orders has log_parameter_max_length_on_error = 0 now
    NOTICE:  the role DATABASE_orders has log_min_messages = log now
    NOTICE:  the role DATABASE_orders has log_error_verbosity = terse now
    NOTICE:  the role DATABASE_orders has log_min_error_statement = panic now
    NOTICE:  the role DATABASE_orders has auto_explain.log_min_duration = -1 now
    NOTICE:  the role DATABASE_orders may connect to the database DATABASE
    NOTICE:  the role DATABASE_orders has the rights of outbox.grant_writer
    NOTICE:  in the database DATABASE everybody may create objects in the schema public; to take that right away, set roles.public=revoke

    # again
    NOTICE:  the role DATABASE_relay has the rights of outbox.grant_relay
    NOTICE:  the role DATABASE_orders has the rights of outbox.grant_writer
    NOTICE:  in the database DATABASE everybody may create objects in the schema public; to take that right away, set roles.public=revoke

    # roles.public=revoke
    NOTICE:  the role DATABASE_relay has the rights of outbox.grant_relay
    NOTICE:  the role DATABASE_orders has the rights of outbox.grant_writer
    NOTICE:  in the database DATABASE only roles that were granted it may create objects in the schema public

    # roles.public=off
    ERROR:  roles.public is off, and should be keep or revoke
    ");
    let anybody = "SELECT has_database_privilege('public', current_database(), 'CONNECT')
                   AND has_function_privilege('public', 'pg_advisory_lock(bigint)', 'EXECUTE')";
    assert!(sqlx::query_scalar::<_, bool>(anybody).fetch_one(&mut conn).await.unwrap());
}

/// What no role may do, in either database.
const ANYBODY: [&str; 16] = [
    "CREATE SCHEMA mine",
    "CREATE TABLE outbox.mine ()",
    "CREATE TABLE public.mine ()",
    "CREATE TEMPORARY TABLE mine ()",
    "CREATE FUNCTION outbox.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "SELECT setval('outbox.position', 1000)",
    "ALTER TABLE outbox.event DISABLE TRIGGER ALL",
    "SELECT lo_creat(-1)",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'anything')",
    // With these, whoever may only read could stop every writer, relay or migration.
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_advisory_xact_lock(1869968482, 1)",
    "SELECT pg_advisory_xact_lock_shared(1869968482, 3)",
    "SELECT pg_try_advisory_lock(1869968492, 1)",
    "SELECT pg_try_advisory_xact_lock_shared(1)",
    "SELECT pg_advisory_unlock_all()",
];
/// What a role may not do: database, program, statements.
const REFUSED: [(&str, &str, &[&str]); 5] = [
    (
        "person",
        "person_api",
        &[
            "SELECT nextval('outbox.position')",
            "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload)
                 VALUES (1, 'person', 'x', 1, 'person.new', '{}')",
            "SELECT payload FROM outbox.event",
            "SELECT headers FROM outbox.event",
            "DELETE FROM outbox.aggregate",
            "UPDATE outbox.aggregate SET version = 9",
            "SELECT outbox.number_by('person', 'outbox')",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, previous_id)
                 VALUES ('person', 'x', 1, 'person.new', '{}', outbox.uuid7())",
            "UPDATE outbox.event SET payload = '{}'",
            "DELETE FROM outbox.event",
            "TRUNCATE outbox.event",
            "SELECT * FROM outbox.parked",
            "UPDATE outbox.relay SET low_water = 1000",
            "UPDATE outbox.source SET name = 'another'",
            "UPDATE person.migration SET success = false",
            "SELECT outbox.erase_step(1)",
            "DELETE FROM outbox.erasure",
            "SELECT outbox.keep_erasures_out()",
            "SELECT outbox.try_lead(1)",
            "TRUNCATE person.person CASCADE",
            "CREATE TABLE person.mine ()",
        ],
    ),
    (
        "person",
        "outbox_relay",
        &[
            "SELECT * FROM person.person",
            "SELECT * FROM person.idempotency",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 VALUES ('person', 'x', 1, 'person.new', '{}')",
            "UPDATE outbox.event SET payload = '{}'",
            "DELETE FROM outbox.event",
            "TRUNCATE outbox.event",
            "SELECT outbox.erase('{person}', '{x}', '{2}')",
            "INSERT INTO outbox.erasure (aggregate_type, aggregate_id, below, up_to) VALUES ('person', 'x', 1, 1)",
            "SELECT outbox.erase_events('person', 'x', 0, 9, 9, 9)",
            "UPDATE outbox.source SET name = 'another'",
        ],
    ),
    (
        "score",
        "score_projector",
        &[
            "UPDATE score.model SET consumer = 'another'",
            "DELETE FROM score.model",
            "DELETE FROM score.chain",
            "SELECT version FROM score.chain",
            "UPDATE outbox.aggregate SET version = 9",
            "SELECT outbox.number_by('score', 'writer')",
            "DELETE FROM inbox.skipped",
            "UPDATE outbox.event SET payload = '{}'",
            "TRUNCATE score.person CASCADE",
            "CREATE TABLE score.mine ()",
            "CREATE TABLE inbox.mine ()",
        ],
    ),
    (
        "score",
        "score_api",
        &[
            "INSERT INTO score.person (id, cpf, created_at, version) VALUES (gen_random_uuid(), 1, now(), 1)",
            "UPDATE score.person SET total = 1",
            "DELETE FROM score.person",
            "SELECT * FROM score.person FOR UPDATE",
            "DELETE FROM score.entry",
            "UPDATE score.model SET since = now()",
            "UPDATE inbox.aggregate SET version = 9",
            "SELECT * FROM inbox.held",
            "SELECT * FROM inbox.rejected",
            "SELECT * FROM outbox.event",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 VALUES ('score', 'x', 1, 'score.new', '{}')",
            "SELECT score.erase_old('{}')",
            "SELECT score.create_shadow()",
            "SELECT score.hold_shadow()",
            "SELECT * FROM inbox.erasure",
            "SELECT score.exchange_tables()",
            "CREATE TABLE score.mine ()",
        ],
    ),
    ("score", "outbox_relay", &["SELECT * FROM score.person", "SELECT * FROM inbox.held"]),
];

#[tokio::test]
async fn what_a_role_must_not_do_is_refused() {
    let sides = [Side::new("person").await, Side::new("score").await];
    for side in &sides {
        Roles::make(&side.admin).await;
    }
    for (name, program, statements) in REFUSED {
        let [person, score] = &sides;
        let (side, other) = if name == "person" { (person, score) } else { (score, person) };
        let mut conn = PgConnection::connect(&Roles::of(&side.admin).url(program)).await.unwrap();
        for statement in ANYBODY.iter().chain(statements) {
            let refused = conn.execute(AssertSqlSafe(*statement)).await.expect_err(statement);
            let code = refused.as_database_error().unwrap().code().unwrap().into_owned();
            assert_eq!(code, "42501", "{program} in {name}: {statement}: {refused}");
        }
        // Nor does it get into the other side's database.
        let database = other.admin.rsplit('/').next().unwrap();
        let own = Roles::of(&side.admin).url(program);
        let elsewhere = format!("{}/{database}", own.rsplit_once('/').unwrap().0);
        let refused = PgConnection::connect(&elsewhere).await.expect_err("a database of the other side");
        assert_eq!(refused.as_database_error().unwrap().code().unwrap(), "42501", "{refused}");
    }
}

/// ANALYZE keeps values of these columns beyond the end of their rows: nothing personal may be among them.
#[tokio::test]
async fn the_server_keeps_samples_of_nothing_personal() {
    const SAMPLED: &str = "
    SELECT c.oid::regclass || ': ' || string_agg(a.attname, ', ' ORDER BY a.attnum)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relkind IN ('r', 'p') AND c.relname <> 'migration' AND a.attstattarget IS DISTINCT FROM 0
      AND c.relnamespace::regnamespace::text IN ('person', 'score', 'score_shadow', 'inbox', 'outbox')
      -- Of the type json no values are kept.
      AND a.atttypid <> 'json'::regtype
    GROUP BY c.oid ORDER BY c.oid::regclass::text";
    for name in ["person", "score"] {
        let mut side = Side::new(name).await;
        if name == "score" {
            // A model that is being built is a copy of the live one.
            side.conn.execute("SELECT score.create_shadow(); SELECT score.keep_no_samples()").await.unwrap();
        }
        let sampled: Vec<String> = sqlx::query_scalar(SAMPLED).fetch_all(&mut side.conn).await.unwrap();
        insta::assert_snapshot!(format!("what is sampled in {name}"), sampled.join("\n"));
    }

    // What was sampled before the columns were told to keep nothing goes when the roles are made again.
    let mut side = Side::new("person").await;
    let samples =
        "SELECT count(*) FROM pg_stats s WHERE schemaname = 'person' AND s::text LIKE '%Brunhilde%'";
    for sql in [
        "INSERT INTO person.person (id, cpf, name, date_of_birth)
         SELECT gen_random_uuid(), n, 'Brunhilde', now() FROM generate_series(1, 100) n",
        "ANALYZE person.person",
    ] {
        side.conn.execute(sql).await.unwrap();
    }
    let count: i64 = sqlx::query_scalar(samples).fetch_one(&mut side.conn).await.unwrap();
    assert_eq!(count, 0);
    for sql in [
        "ALTER TABLE person.person ALTER COLUMN name SET STATISTICS 100",
        "ANALYZE person.person",
        "ALTER TABLE person.person ALTER COLUMN name SET STATISTICS 0",
        "DELETE FROM person.person",
        "ANALYZE person.person",
    ] {
        side.conn.execute(sql).await.unwrap();
    }
    let count: i64 = sqlx::query_scalar(samples).fetch_one(&mut side.conn).await.unwrap();
    assert_eq!(count, 1, "a sample outlives its rows, and a later ANALYZE");
    Roles::make(&side.admin).await;
    let count: i64 = sqlx::query_scalar(samples).fetch_one(&mut side.conn).await.unwrap();
    assert_eq!(count, 0);
}

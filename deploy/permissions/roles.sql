-- The programs' roles, each with what its program needs and no more. In each database, when its schemas are
-- there, as a superuser; again does no harm:
--
--   psql "$DATABASE_URL" -f deploy/permissions/roles.sql
--
-- A role is made where the schema is that its program is about, which is the first below. It owns nothing and
-- may create nothing. What its rights are is said by the schemas themselves, in their `grant_` functions:
-- migrations that give a role more or less give it to those who are granted already.
--
-- A new role has no password. `\password person_api` in psql sets one that no log and no history sees.
-- Roles belong to the whole server; where one name is not enough, or is taken, a setting gives another:
--
--   PGOPTIONS='-c roles.outbox_relay=relay_of_orders' psql ...
--
-- Each change is told in a NOTICE. In a database that is not the example's, the script changes nothing but these roles and
-- their rights. Before PostgreSQL 15 everybody may create objects in the schema `public` of a database; a setting takes
-- that right away: `-c roles.public=revoke`.
--
-- A service of your own that appends to an outbox has a role of your naming: `-c roles.writer=orders`. So has an operator
-- or a program that only looks at one, and sees no body of an event: `-c roles.reader=oncall`.
DO $$
DECLARE
    wanted record;
    option record;
    taken  record;
    ours   boolean := to_regnamespace('person') IS NOT NULL OR to_regnamespace('score') IS NOT NULL;
    tells  text := coalesce(nullif(current_setting('roles.public', true), ''), 'keep');
BEGIN
    IF tells NOT IN ('keep', 'revoke') THEN
        RAISE EXCEPTION 'roles.public is %, and should be keep or revoke', tells;
    END IF;
    FOR wanted IN
        SELECT coalesce(nullif(current_setting('roles.' || r.program, true), ''),
                        CASE WHEN r.program NOT IN ('writer', 'reader') THEN r.program END) AS role,
               r.about, r.function
        FROM (VALUES (1, 'person_api',      'person', 'person.grant_api'),
                     (2, 'person_api',      'person', 'outbox.grant_writer'),
                     (3, 'score_projector', 'score',  'score.grant_projector'),
                     (4, 'score_projector', 'score',  'inbox.grant_consumer'),
                     (5, 'score_projector', 'score',  'outbox.grant_writer'),
                     (6, 'score_api',       'score',  'score.grant_api'),
                     (7, 'score_api',       'score',  'inbox.grant_reader'),
                     (8, 'outbox_relay',    'outbox', 'outbox.grant_relay'),
                     (9, 'writer',          'outbox', 'outbox.grant_writer'),
                     (10, 'reader',         'outbox', 'outbox.grant_reader')) AS r (n, program, about, function)
        ORDER BY r.n
    LOOP
        CONTINUE WHEN wanted.role IS NULL OR to_regnamespace(wanted.about) IS NULL;
        IF to_regrole(quote_ident(wanted.role)) IS NULL THEN
            EXECUTE format('CREATE ROLE %I LOGIN', wanted.role);
            RAISE NOTICE 'created the role %, without a password', wanted.role;
        END IF;
        -- What is personal must not get into the server's log, whatever else an operator has it log: it would outlive
        -- the person's erasure. The programs log each failure themselves, by its code and constraint.
        --   log_parameter_max_length...  what is given to a statement, of slow statements and of failed ones.
        --   log_min_messages             an error's message may quote a value ("invalid input syntax"). Errors of these
        --                                roles are not logged by the server; what it logs of itself still is, such as
        --                                slow statements and waits for locks.
        --   log_error_verbosity          DETAIL ("Failing row contains", "Key (cpf)=") and CONTEXT of what is logged.
        --   log_min_error_statement      statements with literals in them.
        --   auto_explain...              plans show the values that they were made for.
        FOR option IN
            SELECT * FROM (VALUES ('log_parameter_max_length', '0'), ('log_parameter_max_length_on_error', '0'),
                                  ('log_min_messages', 'log'), ('log_error_verbosity', 'terse'),
                                  ('log_min_error_statement', 'panic'),
                                  ('auto_explain.log_min_duration', '-1')) AS o (name, value)
        LOOP
            CONTINUE WHEN coalesce((SELECT rolconfig @> ARRAY[option.name || '=' || option.value]
                                    FROM pg_roles WHERE rolname = wanted.role), false);
            EXECUTE format('ALTER ROLE %I SET %s = %L', wanted.role, option.name, option.value);
            RAISE NOTICE 'the role % has % = % now', wanted.role, option.name, option.value;
        END LOOP;
        IF NOT EXISTS (SELECT FROM pg_database d, aclexplode(d.datacl) a
                       WHERE d.datname = current_database() AND a.privilege_type = 'CONNECT'
                         AND a.grantee = to_regrole(quote_ident(wanted.role))) THEN
            EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), wanted.role);
            RAISE NOTICE 'the role % may connect to the database %', wanted.role, current_database();
        END IF;
        IF to_regprocedure(wanted.function || '(regrole)') IS NULL THEN
            RAISE NOTICE '% is not there yet: migrate, and run this again', wanted.function;
            CONTINUE;
        END IF;
        EXECUTE format('SELECT %s(%L::regrole)', wanted.function, quote_ident(wanted.role));
        RAISE NOTICE 'the role % has the rights of %', wanted.role, wanted.function;
        -- To see who sleeps in a transaction: otherwise every idle one that has appended counts as a possible
        -- writer of whatever is missing.
        IF wanted.function = 'outbox.grant_relay' AND NOT pg_has_role(wanted.role, 'pg_read_all_stats', 'MEMBER') THEN
            EXECUTE format('GRANT pg_read_all_stats TO %I', wanted.role);
            RAISE NOTICE 'the role % is a member of pg_read_all_stats', wanted.role;
        END IF;
    END LOOP;

    -- The databases of persons and of scores are for nobody else. (Another service's may well be.)
    IF ours THEN
        RAISE NOTICE 'in the database % only roles that were granted it may connect, make temporary tables and large objects',
            current_database();
        EXECUTE format('REVOKE CONNECT, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
        -- Large objects belong to no table, so whoever may make one may store what it likes.
        REVOKE EXECUTE ON FUNCTION lo_creat(integer), lo_create(oid), lo_from_bytea(oid, bytea) FROM PUBLIC;
    END IF;
    -- Whoever may take any advisory lock may take those by which writers, relays and migrations wait for each other: a
    -- role that only reads could stop every writer. The programs' roles take theirs by functions of the schemas, which
    -- run with the owners' rights. So the owners keep the right, which `migrate` needs as well. (In a database that
    -- others use, too, they may depend on these locks.)
    IF ours THEN
        RAISE NOTICE 'in the database % only superusers and the owners of our schemas may call advisory lock functions',
            current_database();
        FOR taken IN
            SELECT p.oid::regprocedure AS function FROM pg_proc p
            WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname ~ '^pg_(try_)?advisory'
        LOOP
            EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', taken.function);
            FOR wanted IN
                SELECT DISTINCT n.nspowner::regrole AS role FROM pg_namespace n
                WHERE n.nspname IN ('person', 'score', 'inbox', 'outbox')
            LOOP
                EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', taken.function, wanted.role);
            END LOOP;
        END LOOP;
    END IF;
    -- Samples of what is personal, from before the columns were told to keep none.
    DELETE FROM pg_statistic s USING pg_attribute a
    WHERE a.attrelid = s.starelid AND a.attnum = s.staattnum AND a.attstattarget = 0
      AND a.attrelid IN (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                         WHERE n.nspname IN ('person', 'score', 'score_shadow', 'score_old', 'inbox', 'outbox'));
    -- As everywhere from PostgreSQL 15 on. The programs of a database that is not ours may rely on it.
    IF EXISTS (SELECT FROM pg_namespace n, aclexplode(n.nspacl) a
               WHERE n.nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE') THEN
        IF ours OR tells = 'revoke' THEN
            REVOKE CREATE ON SCHEMA public FROM PUBLIC;
            RAISE NOTICE 'in the database % only roles that were granted it may create objects in the schema public',
                current_database();
        ELSE
            RAISE NOTICE 'in the database % everybody may create objects in the schema public; to take that right away, '
                         'set roles.public=revoke', current_database();
        END IF;
    END IF;
END
$$;

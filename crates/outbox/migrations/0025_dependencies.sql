-- What was found by use of the chains and captures: an outbox that is dropped takes its triggers along, a role changes its
-- own captures alone, and an aggregate whose state only one subscriber has is not published past the others.
SET LOCAL lock_timeout = '2s';

-- Captured tables and the schema outbox.
--
-- `DROP SCHEMA outbox CASCADE` left the triggers on captured tables, because the body of a function is a text, on which the
-- server sees no dependency. They called what was gone, and every writer failed. So each trigger has a condition that names
-- the row type of outbox.touched, and is always true: with that table, CASCADE drops the trigger, and its NOTICE lists it.
--
-- A trigger that finds no outbox and does nothing would also let writers go on. But it would do the same where the outbox is
-- there and a search fails, or is being restored: changes would be lost, and neither the writer nor the catalog would show
-- it. A trigger that is gone is in no catalog, and outbox.capture_problem says so.
-- As before, with that condition.
CREATE OR REPLACE FUNCTION outbox.make_captured_table(captured outbox.captured_table, is_root boolean, owner regrole) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $outer$
DECLARE
    of_capture constant integer := captured.capture;
    of_number  constant integer := captured.number;
    key     text;
    sources record;
    made    record;
    renamed text;
BEGIN
    SELECT CASE count(*) WHEN 1 THEN format('(x.%I::text COLLATE "C")', min(k.name))
           ELSE format('CASE WHEN %s THEN json_build_array(%s)::text COLLATE "C" END',
                       string_agg(format('x.%I IS NOT NULL', k.name), ' AND ' ORDER BY k.n),
                       string_agg(format('x.%I', k.name), ', ' ORDER BY k.n)) END
    INTO key FROM unnest(captured.key_names) WITH ORDINALITY AS k (name, n);
    renamed := format($$
    EXCEPTION WHEN undefined_column THEN
        RAISE EXCEPTION 'the table %%.%% is captured by its key (%%): %%', TG_TABLE_SCHEMA, TG_TABLE_NAME, %L, SQLERRM
            USING ERRCODE = SQLSTATE,
                  HINT = 'If the column was renamed, call outbox.capture for the table again, with the new name as its key.';
    END;$$, array_to_string(captured.key_names, ', '));
    -- Statements that add rows, or remove them.
    FOR sources IN
        SELECT s.action, CASE WHEN is_root THEN s.lived ELSE 0 END AS lived
        FROM (VALUES ('insert', -1), ('delete', 1)) AS s (action, lived)
    LOOP
        PERFORM outbox.make_captured(format('touch_%s_%s() RETURNS trigger', of_number, sources.action), '', format($$
DECLARE
    rows integer;
    one  text;
BEGIN
    BEGIN
        SELECT count(*), min(k.key) INTO rows, one FROM (SELECT %1$s AS key FROM outbox_rows x LIMIT 2) AS k;%2$s
    IF rows = 1 AND one IS NOT NULL THEN
        INSERT INTO outbox.touched (capture, lived, keys) VALUES (%3$s, %4$s, ARRAY[one]);
    ELSIF rows > 1 THEN
        INSERT INTO outbox.touched (capture, lived, keys)
        SELECT %3$s, %4$s, array_agg(k.key)
        FROM (SELECT d.key, (row_number() OVER () - 1) / 1000 AS page
              FROM (SELECT DISTINCT %1$s AS key FROM outbox_rows x) AS d WHERE d.key IS NOT NULL) AS k
        GROUP BY k.page;
    END IF;
    RETURN NULL;
END
$$, key, renamed, of_capture, sources.lived), owner, false);
    END LOOP;
    -- A key that changes is one removed and one added; a key that stays is touched.
    PERFORM outbox.make_captured(format('touch_%s_update() RETURNS trigger', of_number), '', format($$
DECLARE
    rows   integer;
    before text;
    after  text;
BEGIN
    BEGIN
        SELECT count(*), min(o.key), min(n.key) INTO rows, before, after
        FROM (SELECT %1$s AS key FROM outbox_old_rows x LIMIT 2) AS o,
             (SELECT %1$s AS key FROM outbox_rows x LIMIT 2) AS n;%2$s
    IF rows = 1 AND before = after THEN
        INSERT INTO outbox.touched (capture, lived, keys) VALUES (%3$s, 0, ARRAY[after]);
    ELSIF rows > 0 THEN
        INSERT INTO outbox.touched (capture, lived, keys)
        SELECT %3$s, k.lived, array_agg(k.key)
        FROM (SELECT s.key, s.lived, (row_number() OVER (PARTITION BY s.lived) - 1) / 1000 AS page
              FROM (SELECT d.key, sum(d.lived) * %4$s AS lived
                    FROM (SELECT DISTINCT %1$s AS key, 1 AS lived FROM outbox_old_rows x
                          UNION ALL SELECT DISTINCT %1$s, -1 FROM outbox_rows x) AS d
                    WHERE d.key IS NOT NULL GROUP BY d.key) AS s) AS k
        GROUP BY k.lived, k.page;
    END IF;
    RETURN NULL;
END
$$, key, renamed, of_capture, CASE WHEN is_root THEN 1 ELSE 0 END), owner, false);
    PERFORM outbox.make_captured(format('touch_%s_truncate() RETURNS trigger', of_number), '', format($$
BEGIN
    RAISE EXCEPTION 'the table %%.%% is captured, and TRUNCATE tells no trigger which rows it removes', TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'Use DELETE: its deletions are published. To remove rows without an event, as tests do, disable the '
                     'trigger outbox_capture_%s_truncate of the table.';
END
$$, of_number), owner, false);
    FOR made IN
        WITH RECURSIVE t (relation) AS (
            SELECT captured.relation::oid
            UNION ALL
            SELECT i.inhrelid FROM t JOIN pg_inherits i ON i.inhparent = t.relation)
        SELECT t.relation::regclass AS relation, c.action, format('outbox_capture_%s_%s', of_number, c.action) AS name,
               c.definition, g.tgenabled, g.tgqual IS NOT NULL AS goes_with_outbox
        FROM t CROSS JOIN (VALUES
            ('insert', 'AFTER INSERT ON %2$s REFERENCING NEW TABLE AS outbox_rows'),
            ('update', 'AFTER UPDATE ON %2$s REFERENCING OLD TABLE AS outbox_old_rows NEW TABLE AS outbox_rows'),
            ('delete', 'AFTER DELETE ON %2$s REFERENCING OLD TABLE AS outbox_rows'),
            ('truncate', 'BEFORE TRUNCATE ON %2$s')) AS c (action, definition)
        LEFT JOIN pg_trigger g ON g.tgrelid = t.relation AND g.tgname = format('outbox_capture_%s_%s', of_number, c.action)
        JOIN pg_class r ON r.oid = t.relation AND r.relkind IN ('r', 'p')
        WHERE g.tgenabled IS DISTINCT FROM 'O' OR g.tgqual IS NULL
    LOOP
        IF made.tgenabled IS NULL OR NOT made.goes_with_outbox THEN
            EXECUTE format('CREATE OR REPLACE TRIGGER %1$I ' || made.definition || ' WHEN (NULL::outbox.touched IS NULL) '
                           'EXECUTE FUNCTION outbox_capture.touch_%3$s_%4$s()',
                           made.name, made.relation, of_number, made.action);
        ELSE
            EXECUTE format('ALTER TABLE ONLY %s ENABLE TRIGGER %I', made.relation, made.name);
        END IF;
    END LOOP;
END
$outer$;

-- The triggers that there are. Those of tables that belong to others, or are locked by a long transaction, stay as they are:
-- outbox.capture_problem names them. It waits for less than a second, so that no writer is the victim of a deadlock.
SET LOCAL lock_timeout = '500ms';
DO $$
DECLARE
    made record;
BEGIN
    FOR made IN
        SELECT g.tgname, g.tgrelid::regclass AS relation, g.tgenabled, pg_get_triggerdef(g.oid) AS definition
        FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
        WHERE p.pronamespace = 'outbox_capture'::regnamespace AND g.tgqual IS NULL AND NOT g.tgisinternal
        ORDER BY g.tgrelid
    LOOP
        BEGIN
            EXECUTE regexp_replace(
                regexp_replace(made.definition, '^CREATE TRIGGER', 'CREATE OR REPLACE TRIGGER'),
                ' EXECUTE FUNCTION ([^ ]+)$', ' WHEN (NULL::outbox.touched IS NULL) EXECUTE FUNCTION \1');
            -- One that was disabled, as in a test database that uses TRUNCATE, is so again.
            IF made.tgenabled <> 'O' THEN
                EXECUTE format('ALTER TABLE ONLY %s %s TRIGGER %I', made.relation,
                               CASE made.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'A' THEN 'ENABLE ALWAYS'
                               ELSE 'ENABLE REPLICA' END, made.tgname);
            END IF;
        EXCEPTION WHEN insufficient_privilege OR lock_not_available OR deadlock_detected THEN
            NULL;
        END;
    END LOOP;
END
$$;
SET LOCAL lock_timeout = '2s';

-- As before, and the triggers that would stay.
CREATE OR REPLACE VIEW outbox.capture_problem AS
WITH named AS (
    SELECT c.oid, format('%I.%I', n.nspname, c.relname) AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p')
), place AS (
    SELECT t.aggregate_type, t.table_name, t.relation, t.number, t.is_root, t.capture, p.relid::oid AS place
    FROM outbox.captured t
    CROSS JOIN LATERAL (
        WITH RECURSIVE p (relid) AS (
            SELECT c.oid FROM pg_class c WHERE c.oid = t.relation
            UNION ALL
            SELECT i.inhrelid FROM p JOIN pg_inherits i ON i.inhparent = p.relid)
        SELECT p.relid FROM p JOIN pg_class c ON c.oid = p.relid WHERE c.relkind IN ('r', 'p')) AS p
), wanted AS (
    SELECT p.*, format('outbox_capture_%s_%s', p.number, w.action) AS name, g.tgenabled, g.tgqual
    FROM place p
    CROSS JOIN unnest(ARRAY['insert', 'update', 'delete', 'truncate']) AS w (action)
    LEFT JOIN pg_trigger g ON g.tgrelid = p.place AND g.tgname = format('outbox_capture_%s_%s', p.number, w.action)
)
SELECT t.aggregate_type, t.table_name,
       CASE WHEN c.oid IS NULL THEN format('the table %s was dropped', t.table_name)
            WHEN other.oid IS NULL THEN format('the table %s was renamed to %s', t.table_name, c.name)
            ELSE format('the table %s was replaced by another, and the captured one is now %s', t.table_name, c.name) END
           AS finding,
       CASE WHEN c.oid IS NULL AND NOT t.is_root
            THEN format('SELECT outbox.capture again for the root of the type %s, with a body function that does not need it',
                        t.aggregate_type)
            WHEN c.oid IS NOT NULL AND other.oid IS NULL
            THEN format('SELECT outbox.capture again for %s', c.name)
            ELSE format('SELECT outbox.uncapture_type(%L), and then outbox.capture for each table of the aggregate. What was '
                        'missed meanwhile is published by outbox-relay doctor --deep', t.aggregate_type) END AS advice
FROM outbox.captured t LEFT JOIN named c ON c.oid = t.relation LEFT JOIN named other ON other.name = t.table_name
WHERE c.name IS DISTINCT FROM t.table_name
UNION ALL
SELECT t.aggregate_type, t.table_name,
       format('the key of %s was %s when it was captured; a column of it was renamed or dropped', t.table_name, t.key),
       format('Its writers fail. SELECT outbox.capture(%L, %L, key => ...) with the new name of the column', t.table_name,
              t.aggregate_type)
FROM outbox.captured t JOIN outbox.captured_table k ON k.number = t.number
JOIN named c ON c.oid = t.relation AND c.name = t.table_name
WHERE k.key_names IS DISTINCT FROM (
    SELECT array_agg(a.attname::text ORDER BY c.n) FROM unnest(k.key_columns) WITH ORDINALITY AS c (attnum, n)
    JOIN pg_attribute a ON a.attrelid = k.relation AND a.attnum = c.attnum AND NOT a.attisdropped)
UNION ALL
SELECT w.aggregate_type, w.table_name,
       format('%s lacks %s of the triggers of its capture (%s)', w.place::regclass, count(*), string_agg(w.name, ', ')),
       CASE WHEN w.place = w.relation THEN format('SELECT outbox.capture again for %s', w.table_name)
            ELSE format('A partition or child that is newer than the capture: statements on %s itself are not published. SELECT '
                        'outbox.capture again for %s', w.place::regclass, w.table_name) END
FROM wanted w WHERE w.tgenabled IS NULL
GROUP BY w.aggregate_type, w.table_name, w.place, w.relation
UNION ALL
SELECT w.aggregate_type, w.table_name,
       format('triggers of the capture of %s are disabled (%s)', w.place::regclass, string_agg(w.name, ', ')),
       format('Changes are not published. SELECT outbox.capture again for %s, and then publish what was missed: outbox-relay '
              'doctor --deep', w.table_name)
FROM wanted w WHERE w.tgenabled IN ('D', 'R')
GROUP BY w.aggregate_type, w.table_name, w.place
UNION ALL
SELECT w.aggregate_type, w.table_name,
       format('the triggers of the capture of %s are those of an earlier release', w.place::regclass),
       format('If the schema outbox were dropped, they would stay, and its writers would fail. SELECT outbox.capture again for '
              '%s', w.table_name)
FROM wanted w WHERE w.tgenabled IS NOT NULL AND w.tgqual IS NULL
GROUP BY w.aggregate_type, w.table_name, w.place
UNION ALL
SELECT t.aggregate_type, t.table_name,
       format('functions of its capture are missing or were changed (%s)', string_agg(f.name, ', ' ORDER BY f.name)),
       format('SELECT outbox.capture again for %s', t.table_name)
FROM outbox.captured t
JOIN pg_class c ON c.oid = t.relation
CROSS JOIN LATERAL (
    SELECT format('%s_%s', w.word, t.capture) AS name FROM unnest(ARRAY['read', 'append', 'publish', 'state', 'keys']) AS w (word)
    WHERE t.is_root
    UNION ALL
    SELECT format('touch_%s_%s', t.number, w.word) FROM unnest(ARRAY['insert', 'update', 'delete', 'truncate']) AS w (word)) AS f
LEFT JOIN pg_proc p ON p.pronamespace = 'outbox_capture'::regnamespace AND p.proname = f.name
WHERE (p.prosecdef AND p.proowner = c.relowner) IS NOT TRUE
GROUP BY t.aggregate_type, t.table_name
UNION ALL
SELECT t.aggregate_type, t.table_name, format('its body function %s was dropped or renamed', t.body),
       format('Its writers fail. SELECT outbox.capture(%L, %L, body => ...) with the function that there is now', t.table_name,
              t.aggregate_type)
FROM outbox.captured t
WHERE t.body IS NOT NULL AND NOT EXISTS (
    SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE format('%I.%I', n.nspname, p.proname) = split_part(t.body, '(', 1))
UNION ALL
SELECT t.aggregate_type, t.table_name, format('the writers of the type %s count its versions themselves', t.aggregate_type),
       format('Its writers fail. SELECT outbox.number_by(%L, ''outbox''), or outbox.uncapture_type', t.aggregate_type)
FROM outbox.captured t LEFT JOIN outbox.aggregate_type y ON y.aggregate_type = t.aggregate_type
WHERE t.is_root AND y.numbered_by IS DISTINCT FROM 'outbox'
UNION ALL
SELECT p.aggregate_type, p.table_name, format('%s is written by a subscription of logical replication', p.place::regclass),
       'Triggers do not fire for what it writes, so nothing of that is published. Capture the table on the publisher, or '
       'publish what differs from time to time: outbox-relay doctor --deep'
FROM place p WHERE p.place IN (SELECT s.srrelid FROM pg_subscription_rel s);

-- Captures and roles.
--
-- A role that may capture its own tables writes the two tables of captures, so it could change or remove the captures of
-- others. Now only a member of the captured table's owner may, and the owner of the outbox. If the table was dropped, the
-- generated functions still say who that was. Runs with the rights of the role that writes.
CREATE FUNCTION outbox.check_capturer() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    of_type   constant boolean := TG_TABLE_NAME = 'captured_type';
    captures  integer[] := '{}';
    relations oid[] := '{}';
    names     text[] := '{}';
    changed   record;
BEGIN
    IF pg_has_role((SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'outbox'), 'MEMBER') THEN
        RETURN coalesce(NEW, OLD);
    END IF;
    -- As numbers: a table that was dropped has no name.
    IF TG_OP <> 'DELETE' THEN
        captures := captures || NEW.capture;
        IF of_type THEN
            relations := relations || NEW.root::oid;
            names := names || NEW.root_name;
        ELSE
            relations := relations || NEW.relation::oid;
            names := names || NEW.name;
        END IF;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        captures := captures || OLD.capture;
        IF of_type THEN
            relations := relations || OLD.root::oid;
            names := names || OLD.root_name;
        ELSE
            relations := relations || OLD.relation::oid;
            names := names || OLD.name;
        END IF;
    END IF;
    -- A captured table belongs to a type, whose root has an owner, too.
    FOR changed IN
        SELECT n.name, n.is_new, quote_ident(s.nspname) || '.' || quote_ident(c.relname) AS is_named,
               coalesce(c.relowner, (SELECT p.proowner FROM pg_proc p
                                     WHERE p.pronamespace = 'outbox_capture'::regnamespace
                                       AND p.proname = format('read_%s', n.capture)))::regrole AS owner
        FROM (SELECT w.capture, w.relation, w.name, TG_OP <> 'DELETE' AND w.n = 1 AS is_new
              FROM unnest(captures, relations, names) WITH ORDINALITY AS w (capture, relation, name, n)
              UNION ALL
              SELECT t.capture, t.root::oid, t.root_name, false FROM outbox.captured_type t
              WHERE t.capture = ANY (captures) AND NOT of_type) AS n
        LEFT JOIN pg_class c ON c.oid = n.relation
        LEFT JOIN pg_namespace s ON s.oid = c.relnamespace
        ORDER BY n.is_new
    LOOP
        IF pg_has_role(changed.owner, 'MEMBER') IS NOT TRUE THEN
            RAISE EXCEPTION 'the role % may not change the capture of the table %, which belongs to %', current_user,
                            changed.name, coalesce(changed.owner::text, 'no role any more')
                USING ERRCODE = 'insufficient_privilege',
                      HINT = 'A member of the role that owns the table may change its capture, and the owner of the schema '
                             'outbox.';
        ELSIF changed.is_new AND changed.name IS DISTINCT FROM changed.is_named THEN
            -- Statements are made of the name.
            RAISE EXCEPTION 'the table % has another name than %', changed.is_named, changed.name
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Call outbox.capture.';
        END IF;
    END LOOP;
    RETURN coalesce(NEW, OLD);
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.check_capturer() FROM PUBLIC;
CREATE TRIGGER check_capturer BEFORE INSERT OR UPDATE OR DELETE ON outbox.captured_type
    FOR EACH ROW EXECUTE FUNCTION outbox.check_capturer();
CREATE TRIGGER check_capturer BEFORE INSERT OR UPDATE OR DELETE ON outbox.captured_table
    FOR EACH ROW EXECUTE FUNCTION outbox.check_capturer();

-- As before: removes the triggers of a captured table, wherever they are, with their functions. The record goes first, so that
-- a role that may not do it reads why. A function takes its triggers along: the owner of the outbox, who owns the schema of
-- the functions, needs no right on the table.
CREATE OR REPLACE FUNCTION outbox.drop_captured_table(of_number integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET client_min_messages = warning AS $$
DECLARE
    part record;
BEGIN
    DELETE FROM outbox.captured_table t WHERE t.number = of_number;
    FOR part IN SELECT p.oid::regprocedure AS called FROM pg_proc p
                WHERE p.pronamespace = 'outbox_capture'::regnamespace AND p.proname ~ format('^touch_%s_', of_number)
    LOOP
        EXECUTE format('DROP FUNCTION %s CASCADE', part.called);
    END LOOP;
END
$$;

-- As before, in that order.
CREATE OR REPLACE FUNCTION outbox.uncapture_type(aggregate_type text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    of_type  constant text := aggregate_type;
    captured outbox.captured_type;
    part     record;
BEGIN
    PERFORM pg_advisory_xact_lock(1869968482, 5);
    -- What this transaction has changed until now is published.
    SET CONSTRAINTS outbox.publish_touched IMMEDIATE;
    SET CONSTRAINTS outbox.publish_touched DEFERRED;
    SELECT * INTO captured FROM outbox.captured_type c WHERE c.aggregate_type = of_type;
    IF captured.capture IS NULL THEN
        RAISE EXCEPTION 'the type % is not captured', of_type
            USING ERRCODE = 'undefined_object', HINT = 'SELECT * FROM outbox.captured says what is.';
    END IF;
    FOR part IN SELECT t.number FROM outbox.captured_table t WHERE t.capture = captured.capture ORDER BY t.number DESC LOOP
        PERFORM outbox.drop_captured_table(part.number);
    END LOOP;
    DELETE FROM outbox.captured_type c WHERE c.capture = captured.capture;
    FOR part IN SELECT p.oid::regprocedure AS called FROM pg_proc p
                WHERE p.pronamespace = 'outbox_capture'::regnamespace
                  AND p.proname ~ format('^(read|append|publish|state|keys)_%s$', captured.capture)
    LOOP
        EXECUTE format('DROP FUNCTION %s', part.called);
    END LOOP;
END
$$;

-- The index of outbox.touched.
--
-- A hash index grows with the rows that it has at one time, which are few here, and transactions in the same bucket are in
-- each other's way. So it begins with about a thousand buckets, as many as the server expects to need when it makes the
-- index of a table with so many pages. An outbox that captures nothing needs none of this: its table is empty again, without
-- the dead rows that made the index, and the first capture makes the pages.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM outbox.captured_type) THEN
        TRUNCATE outbox.touched;
    END IF;
END
$$;

-- As before, what the owner of captured tables needs, and with the first one that index.
CREATE OR REPLACE FUNCTION outbox.grant_capture(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    -- Before the first capture nobody writes there.
    IF pg_relation_size('outbox.touched_xid') < 4000000 AND NOT EXISTS (SELECT FROM outbox.captured_type) THEN
        TRUNCATE outbox.touched;
        -- Four rows of this size fill a page.
        INSERT INTO outbox.touched (capture, lived, keys)
        SELECT 0, 0, ARRAY[repeat('x', 1900)] FROM generate_series(1, 1600);
        REINDEX INDEX outbox.touched_xid;
        DELETE FROM outbox.touched;
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    GRANT USAGE ON SCHEMA outbox_capture TO PUBLIC;
    GRANT EXECUTE ON FUNCTION outbox_capture.is_left(tid) TO PUBLIC;
    EXECUTE format('GRANT USAGE, CREATE ON SCHEMA outbox_capture TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.captured_type, outbox.captured_table TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.aggregate_type, outbox.aggregate TO %s', role);
    EXECUTE format('GRANT INSERT (capture, lived, keys) ON outbox.touched TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.captured, outbox.capture_problem TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.capture, outbox.uncapture, outbox.uncapture_type, outbox.base_type,'
                   ' outbox.key_columns, outbox.make_captured, outbox.make_captured_type, outbox.make_captured_table,'
                   ' outbox.drop_captured_table, outbox.captured_keys_query, outbox.captured_keys,'
                   ' outbox.begin_states, outbox.captured_states, outbox.publish_state, outbox.publish_states, outbox.capture_of,'
                   ' outbox.captured_difference, outbox.refuse_captured TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.take_touched(integer), outbox.next_touched(refcursor),'
                   ' outbox.lock_captured(integer, text[]), outbox.claim_type(text),'
                   ' outbox.begin_captured(integer, text[]),'
                   ' outbox.append_captured(integer, text, tid, boolean, text),'
                   ' outbox.append_touched(integer, text, tid, bigint, text, boolean, text),'
                   ' outbox.append_captured(integer, text[], boolean[], text[], boolean) TO %s', role);
END
$$;

-- Aggregates whose state only one subscriber has (`backfill --to-queue`).
--
-- Their chain begins with version 1, of an event that the other subscribers never get. An event with version 2 is a gap for
-- these: they hold it, and everything after it, for ever. A receiver without the chain needs its whole state: a baseline, or
-- its deletion. A captured aggregate is published as a baseline then. outbox.publish and an INSERT cannot know whether their
-- body is the whole state, and one that is not would replace what the one subscriber has. So they are refused until a
-- baseline is published, or is what they publish.
CREATE FUNCTION outbox.refuse_unknown(of_type text, of_id text) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM outbox.aggregate a
               WHERE a.aggregate_type = of_type AND a.aggregate_id = of_id AND a.version > 0 AND a.last_position = 0
                 AND a.last_event_id <> '00000000-0000-0000-0000-000000000000') THEN
        RAISE EXCEPTION 'only one queue has version 1 of %/%, so the other subscribers would hold this event for ever',
                        of_type, of_id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Publish its whole state first: SELECT outbox.publish_state(%L, %L), or outbox-relay backfill '
                                '%s for all of the type. Or give the event itself the whole state and the header '
                                '{"baseline": true}.', of_type, of_id, of_type);
    END IF;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.refuse_unknown(text, text) FROM PUBLIC;

-- As before, and such an aggregate is refused.
CREATE OR REPLACE FUNCTION outbox.publish_next(of_type text, of_id text, event_type text, event_id uuid, event_payload json,
                                    event_headers jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    name     constant pg_catalog.text := of_type OPERATOR(pg_catalog.||) '/' OPERATOR(pg_catalog.||) of_id;
    last     constant pg_catalog.text := pg_catalog.current_setting('outbox.chain', true);
    zero     constant pg_catalog.uuid := '00000000-0000-0000-0000-000000000000';
    becomes  pg_catalog.text := 'live';
    is_whole pg_catalog.bool := event_headers OPERATOR(pg_catalog.@>) '{"baseline": true}'::pg_catalog.jsonb;
    counter  pg_catalog.text;
    place    pg_catalog.tid;
    taken    pg_catalog.int8;
    previous pg_catalog.uuid;
    position pg_catalog.int8;
BEGIN
    IF (event_type OPERATOR(pg_catalog.<>) '' AND of_type OPERATOR(pg_catalog.<>) '' AND of_id OPERATOR(pg_catalog.<>) ''
        AND pg_catalog.octet_length(event_type) OPERATOR(pg_catalog.<=) 255
        AND pg_catalog.octet_length(of_type) OPERATOR(pg_catalog.<=) 255
        AND pg_catalog.octet_length(of_id) OPERATOR(pg_catalog.<=) 255) IS NOT TRUE THEN
        PERFORM outbox.check_name('outbox.publish', 'type', event_type),
                outbox.check_name('outbox.publish', 'aggregate_type', of_type),
                outbox.check_name('outbox.publish', 'aggregate_id', of_id);
    END IF;
    IF event_type OPERATOR(pg_catalog.=) (of_type OPERATOR(pg_catalog.||) '.deleted') THEN
        becomes := 'ended';
        is_whole := true;
    END IF;
    -- outbox.number_by waits for who has this lock, and its change comes before or after the event.
    PERFORM pg_catalog.pg_advisory_xact_lock_shared(1869968482, 1);
    SELECT t.numbered_by INTO counter FROM outbox.aggregate_type t WHERE t.aggregate_type OPERATOR(pg_catalog.=) of_type;
    IF (counter OPERATOR(pg_catalog.=) 'outbox') IS NOT TRUE THEN
        PERFORM outbox.begin_type(of_type, counter);
    END IF;
    IF pg_catalog.substr(last, pg_catalog.strpos(last, ' ') OPERATOR(pg_catalog.+) 1) OPERATOR(pg_catalog.=) name THEN
        UPDATE outbox.aggregate a
        SET version = a.version OPERATOR(pg_catalog.+) 1, previous_event_id = a.last_event_id, last_event_id = event_id,
            last_position = outbox.next_position_above(a.last_position), state = becomes, body_hash = NULL
        WHERE a.ctid OPERATOR(pg_catalog.=) pg_catalog.split_part(last, ' ', 1)::pg_catalog.tid
          AND a.aggregate_type OPERATOR(pg_catalog.=) of_type AND a.aggregate_id OPERATOR(pg_catalog.=) of_id
          AND (a.last_position OPERATOR(pg_catalog.>) 0 OR a.last_event_id OPERATOR(pg_catalog.=) zero OR is_whole)
        RETURNING a.version, a.previous_event_id, a.last_position, a.ctid INTO taken, previous, position, place;
    END IF;
    WHILE place IS NULL LOOP
        UPDATE outbox.aggregate a
        SET version = a.version OPERATOR(pg_catalog.+) 1, previous_event_id = a.last_event_id, last_event_id = event_id,
            last_position = outbox.next_position_above(a.last_position), state = becomes, body_hash = NULL
        WHERE a.aggregate_type OPERATOR(pg_catalog.=) of_type AND a.aggregate_id OPERATOR(pg_catalog.=) of_id
          AND (a.last_position OPERATOR(pg_catalog.>) 0 OR a.last_event_id OPERATOR(pg_catalog.=) zero OR is_whole)
        RETURNING a.version, a.previous_event_id, a.last_position, a.ctid INTO taken, previous, position, place;
        EXIT WHEN place IS NOT NULL;
        -- The first event of the aggregate, unless another transaction writes it meanwhile: then this waits for its end.
        INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
        VALUES (of_type, of_id, 1, event_id, outbox.next_position_above(0), becomes)
        ON CONFLICT DO NOTHING
        RETURNING a.version, a.previous_event_id, a.last_position, a.ctid INTO taken, previous, position, place;
        IF place IS NULL THEN
            PERFORM outbox.refuse_unknown(of_type, of_id);
        END IF;
    END LOOP;
    PERFORM pg_catalog.set_config(
        'outbox.chain', place::pg_catalog.text OPERATOR(pg_catalog.||) ' ' OPERATOR(pg_catalog.||) name, true);
    INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
    VALUES (position, event_id, of_type, of_id, taken, event_type, event_payload, event_headers, previous);
    RETURN taken;
END
$$;

-- The same of an INSERT, where the writers have taken over the versions.
CREATE OR REPLACE FUNCTION outbox.continue_chain() RETURNS trigger
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    zero    constant pg_catalog.uuid := '00000000-0000-0000-0000-000000000000';
    becomes pg_catalog.text := 'live';
    is_whole pg_catalog.bool := NEW.headers OPERATOR(pg_catalog.@>) '{"baseline": true}'::pg_catalog.jsonb;
    counter pg_catalog.text;
    last    pg_catalog.text := pg_catalog.current_setting('outbox.chain', true);
    name    pg_catalog.text;
    place   pg_catalog.tid;
BEGIN
    IF (NEW.version OPERATOR(pg_catalog.>=) 1
        AND pg_catalog.octet_length(NEW.aggregate_type) OPERATOR(pg_catalog.<=) 255
        AND pg_catalog.octet_length(NEW.aggregate_id) OPERATOR(pg_catalog.<=) 255
        AND NEW.id IS NOT NULL AND NEW.position IS NOT NULL) IS NOT TRUE THEN
        RETURN NEW;
    END IF;
    SELECT t.numbered_by INTO counter FROM outbox.aggregate_type t
    WHERE t.aggregate_type OPERATOR(pg_catalog.=) NEW.aggregate_type;
    IF counter IS NULL THEN
        PERFORM outbox.note_type(NEW.aggregate_type, 'writer');
    ELSIF counter OPERATOR(pg_catalog.=) 'outbox' THEN
        RAISE EXCEPTION 'the outbox counts the versions of the type %, and the event of %/% has its own version, %',
                        NEW.aggregate_type, NEW.aggregate_type, NEW.aggregate_id, NEW.version
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Use outbox.publish, which takes the next version. To let the writers of this type count, the owner '
                         'of the outbox calls outbox.number_by.';
    END IF;
    name := NEW.aggregate_type OPERATOR(pg_catalog.||) '/' OPERATOR(pg_catalog.||) NEW.aggregate_id;
    IF NEW.type OPERATOR(pg_catalog.=) (NEW.aggregate_type OPERATOR(pg_catalog.||) '.deleted') THEN
        becomes := 'ended';
        is_whole := true;
    END IF;
    IF NEW.version OPERATOR(pg_catalog.=) 1 THEN
        INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
        VALUES (NEW.aggregate_type, NEW.aggregate_id, 1, NEW.id, NEW.position, becomes)
        ON CONFLICT DO NOTHING
        RETURNING aggregate.ctid INTO place;
        NEW.previous_id := zero;
    ELSE
        -- `(page,line) TYPE/ID`: the place has no space.
        IF pg_catalog.substr(last, pg_catalog.strpos(last, ' ') OPERATOR(pg_catalog.+) 1) OPERATOR(pg_catalog.=) name THEN
            UPDATE outbox.aggregate a
            SET version = NEW.version, previous_event_id = a.last_event_id, last_event_id = NEW.id,
                last_position = NEW.position, state = becomes, body_hash = NULL
            WHERE a.ctid OPERATOR(pg_catalog.=) pg_catalog.split_part(last, ' ', 1)::pg_catalog.tid
              AND a.aggregate_type OPERATOR(pg_catalog.=) NEW.aggregate_type
              AND a.aggregate_id OPERATOR(pg_catalog.=) NEW.aggregate_id
              AND a.version OPERATOR(pg_catalog.=) (NEW.version OPERATOR(pg_catalog.-) 1)
              AND a.last_position OPERATOR(pg_catalog.<) NEW.position
              AND (a.last_position OPERATOR(pg_catalog.>) 0 OR a.last_event_id OPERATOR(pg_catalog.=) zero OR is_whole)
            RETURNING a.previous_event_id, a.ctid INTO NEW.previous_id, place;
        END IF;
        IF place IS NULL THEN
            UPDATE outbox.aggregate a
            SET version = NEW.version, previous_event_id = a.last_event_id, last_event_id = NEW.id,
                last_position = NEW.position, state = becomes, body_hash = NULL
            WHERE a.aggregate_type OPERATOR(pg_catalog.=) NEW.aggregate_type
              AND a.aggregate_id OPERATOR(pg_catalog.=) NEW.aggregate_id
              AND a.version OPERATOR(pg_catalog.=) (NEW.version OPERATOR(pg_catalog.-) 1)
              AND a.last_position OPERATOR(pg_catalog.<) NEW.position
              AND (a.last_position OPERATOR(pg_catalog.>) 0 OR a.last_event_id OPERATOR(pg_catalog.=) zero OR is_whole)
            RETURNING a.previous_event_id, a.ctid INTO NEW.previous_id, place;
        END IF;
    END IF;
    IF place IS NULL THEN
        IF is_whole IS NOT TRUE THEN
            PERFORM outbox.refuse_unknown(NEW.aggregate_type, NEW.aggregate_id);
        END IF;
        NEW.previous_id := outbox.take_up_chain(NEW.aggregate_type, NEW.aggregate_id, NEW.version, NEW.id, NEW.position,
                                                becomes);
    ELSE
        PERFORM pg_catalog.set_config(
            'outbox.chain', place::pg_catalog.text OPERATOR(pg_catalog.||) ' ' OPERATOR(pg_catalog.||) name, true);
    END IF;
    RETURN NEW;
END
$$;

-- Indexes that are missing.
--
-- A migration makes an index of a table that is large by itself only if it locks out nobody for long. The others are made
-- beside the writers, which takes no part in a transaction. `outbox-relay migrate` runs these statements, one by one, in
-- this order; after `migrate --print`, psql does, by \gexec.
CREATE VIEW outbox.missing_index AS
WITH wanted AS (
    SELECT p.name || '_whole_state' AS name, outbox.whole_state_index(p.name, true) AS statement, p.upper
    FROM outbox.partition_without_index p
    UNION ALL
    SELECT 'parked_id', outbox.parked_index(true), 0
    WHERE NOT EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = to_regclass('outbox.parked_id') AND i.indisvalid)
)
-- One that was interrupted has left an index that is not valid.
SELECT w.name, format('DROP INDEX CONCURRENTLY outbox.%I', w.name) AS statement, w.upper, 1 AS step
FROM wanted w WHERE to_regclass(format('outbox.%I', w.name)) IS NOT NULL
UNION ALL
SELECT w.name, w.statement, w.upper, 2 FROM wanted w
ORDER BY upper, name, step;
COMMENT ON VIEW outbox.missing_index IS
    'A row: a statement that makes a missing index beside writers. Run them in this order, outside of a transaction.';

-- What an event costs whose transaction writes a single row. Most of it was not the work: it was to prepare a dozen checks for
-- each INSERT, and to run many small statements where few do.

-- A UUID of version 7, as before. Its names are bound when it is made, and not by the search_path of who inserts an event.
CREATE OR REPLACE FUNCTION outbox.uuid7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
                FROM 1 FOR 6),
            52, 1), 53, 1),
        'hex')::uuid;

-- Whether a message can carry these headers, as before. It runs with the rights of the outbox's owner where outbox.publish
-- inserts, under the search_path of the caller: so every name and operator is qualified.
CREATE OR REPLACE FUNCTION outbox.are_headers(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN pg_catalog.jsonb_typeof(headers) OPERATOR(pg_catalog.=) 'object'
       AND NOT pg_catalog.jsonb_path_exists(headers, '$.**{5}')
       AND NOT headers OPERATOR(pg_catalog.?|) ARRAY['CC', 'BCC']
       AND (SELECT pg_catalog.count(*) OPERATOR(pg_catalog.<=) 64
                   AND coalesce(pg_catalog.max(pg_catalog.octet_length(k)), 0) OPERATOR(pg_catalog.<=) 255
            FROM pg_catalog.jsonb_object_keys(headers) AS k);
END
$$;

-- The rules of an event, in one check. PostgreSQL reads and prepares each check of a table again for each statement: eleven
-- of them took more than half of the time of an INSERT. What a rule refuses has the rule's name as its constraint, as before.
--   event_aggregate_id_check, event_aggregate_type_check, event_type_check   1 to 255 bytes.
--   event_payload_size, event_headers_size   sizes as text: what another table had compressed would otherwise pass.
--   event_headers_check, event_headers_fit   what a message can carry.
--   event_version_check                      from 1.
--   event_created_at_range                   what RFC 3339 can write.
--   event_version_last, event_position_range a bigint whose next one is a bigint.
-- What of the stored events breaks one of the last three can still be erased.
CREATE FUNCTION outbox.refuse_event(at_position bigint, aggregate_type text, aggregate_id text, version bigint, type text,
                                    payload json, headers jsonb, created_at timestamptz) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    erased constant boolean := coalesce(headers @> '{"erased": true}', false);
    broken constant text := CASE
        WHEN octet_length(aggregate_id) NOT BETWEEN 1 AND 255 THEN 'event_aggregate_id_check'
        WHEN octet_length(aggregate_type) NOT BETWEEN 1 AND 255 THEN 'event_aggregate_type_check'
        WHEN NOT erased AND (created_at < '0001-01-01 00:00:00+00' OR created_at >= '10000-01-01 00:00:00+00')
            THEN 'event_created_at_range'
        WHEN jsonb_typeof(headers) <> 'object' THEN 'event_headers_check'
        WHEN NOT outbox.are_headers(headers) THEN 'event_headers_fit'
        WHEN octet_length(headers::text) > 65536 THEN 'event_headers_size'
        WHEN octet_length(payload::text) > 16777216 THEN 'event_payload_size'
        WHEN NOT erased AND at_position NOT BETWEEN 1 AND 9223372036854775806 THEN 'event_position_range'
        WHEN octet_length(type) NOT BETWEEN 1 AND 255 THEN 'event_type_check'
        WHEN version < 1 THEN 'event_version_check'
        WHEN NOT erased AND version = 9223372036854775807 THEN 'event_version_last' END;
BEGIN
    IF broken IS NOT NULL THEN
        RAISE EXCEPTION 'new row for relation "event" violates check constraint "%"', broken
            USING ERRCODE = 'check_violation', SCHEMA = 'outbox', TABLE = 'event', CONSTRAINT = broken;
    END IF;
    RETURN true;
END
$$;

-- Each writer's INSERT calls it, so it has no settings, and names and operators are qualified.
CREATE FUNCTION outbox.is_event(at_position bigint, aggregate_type text, aggregate_id text, version bigint, type text,
                                payload json, headers jsonb, created_at timestamptz) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF headers IS NULL
       AND aggregate_id OPERATOR(pg_catalog.<>) '' AND pg_catalog.octet_length(aggregate_id) OPERATOR(pg_catalog.<) 256
       AND aggregate_type OPERATOR(pg_catalog.<>) '' AND pg_catalog.octet_length(aggregate_type) OPERATOR(pg_catalog.<) 256
       AND type OPERATOR(pg_catalog.<>) '' AND pg_catalog.octet_length(type) OPERATOR(pg_catalog.<) 256
       AND version OPERATOR(pg_catalog.>) 0 AND version OPERATOR(pg_catalog.<) 9223372036854775807
       AND at_position OPERATOR(pg_catalog.>) 0 AND at_position OPERATOR(pg_catalog.<) 9223372036854775807
       AND pg_catalog.octet_length(payload::pg_catalog.text) OPERATOR(pg_catalog.<=) 16777216
       AND created_at OPERATOR(pg_catalog.>=) '0001-01-01 00:00:00+00'::pg_catalog.timestamptz
       AND created_at OPERATOR(pg_catalog.<) '10000-01-01 00:00:00+00'::pg_catalog.timestamptz THEN
        RETURN true;
    END IF;
    RETURN outbox.refuse_event(at_position, aggregate_type, aggregate_id, version, type, payload, headers, created_at);
END
$$;

-- NOT VALID, as before: what is stored already stays, and is not read now. This waits for open writers and stops those behind
-- it, so it gives up soon: run it again then.
SET LOCAL lock_timeout = '2s';
ALTER TABLE outbox.event
    DROP CONSTRAINT event_aggregate_id_check, DROP CONSTRAINT event_aggregate_type_check,
    DROP CONSTRAINT event_created_at_range, DROP CONSTRAINT event_headers_check, DROP CONSTRAINT event_headers_fit,
    DROP CONSTRAINT event_headers_size, DROP CONSTRAINT event_payload_size, DROP CONSTRAINT event_position_range,
    DROP CONSTRAINT event_type_check, DROP CONSTRAINT event_version_check, DROP CONSTRAINT event_version_last,
    ADD CONSTRAINT event_rules CHECK (
        outbox.is_event(position, aggregate_type, aggregate_id, version, type, payload, headers, created_at)) NOT VALID;

-- As before, and for a transaction with one statement on one aggregate in a single step less each: what is captured, and who
-- counts the versions, is a condition of the statement that takes the key. It also returns where the chain stands. Under
-- another search_path than the generated functions have, the name of the table does not match, and the long way finds out.
DROP FUNCTION outbox.take_touched(integer);
CREATE FUNCTION outbox.take_touched(of_capture integer, OUT key text, OUT place tid, OUT keys refcursor, OUT version bigint,
                                    OUT state text)
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
#variable_conflict use_column
DECLARE
    mine    constant pg_catalog.xid8 := pg_catalog.pg_current_xact_id();
    of_type pg_catalog.text;
    lived   pg_catalog.int4;
    many    pg_catalog.record;
BEGIN
    -- outbox.number_by waits for who has this lock, and comes before or after the events, and not in between.
    PERFORM pg_catalog.pg_advisory_xact_lock_shared(1869968482, 1);
    DELETE FROM outbox.touched t
    USING outbox.captured_type c, outbox.aggregate_type n
    WHERE t.xid OPERATOR(pg_catalog.=) mine AND t.capture OPERATOR(pg_catalog.=) of_capture
      AND pg_catalog.cardinality(t.keys) OPERATOR(pg_catalog.=) 1
      AND NOT EXISTS (SELECT FROM outbox.touched o
                      WHERE o.xid OPERATOR(pg_catalog.=) mine AND o.ctid OPERATOR(pg_catalog.<>) t.ctid)
      AND c.capture OPERATOR(pg_catalog.=) of_capture
      AND c.root::pg_catalog.text OPERATOR(pg_catalog.=) c.root_name
      AND n.aggregate_type OPERATOR(pg_catalog.=) c.aggregate_type AND n.numbered_by OPERATOR(pg_catalog.=) 'outbox'
    RETURNING t.keys[1], t.lived, c.aggregate_type INTO key, lived, of_type;
    IF key IS NULL THEN
        of_type := outbox.capture_type(of_capture);
        SELECT m.key, m.place, m.keys INTO many FROM outbox.take_many(of_capture, of_type) AS m;
        key := many.key;
        place := many.place;
        keys := many.keys;
    ELSE
        -- To look the row up, as this does, would make SERIALIZABLE transactions fail that share a page of the index.
        IF pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'serializable' THEN
            UPDATE outbox.aggregate a SET version = a.version
            WHERE a.aggregate_type OPERATOR(pg_catalog.=) of_type AND a.aggregate_id OPERATOR(pg_catalog.=) key
              AND a.version OPERATOR(pg_catalog.>) 0
            RETURNING a.ctid, a.version, a.state INTO place, version, state;
        END IF;
        IF place IS NULL THEN
            place := outbox.lock_touched(of_type, key, lived OPERATOR(pg_catalog.>) 0);
        END IF;
    END IF;
    IF key IS NOT NULL AND version IS NULL THEN
        SELECT a.version, a.state INTO version, state FROM outbox.aggregate a WHERE a.ctid OPERATOR(pg_catalog.=) place;
    END IF;
END
$$;

-- The next position, as before, with the name of the aggregate where the sequence is behind.
CREATE FUNCTION outbox.next_position_above(last bigint, of_type text, of_id text) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    taken pg_catalog.int8 := outbox.next_position();
BEGIN
    IF taken OPERATOR(pg_catalog.<=) last THEN
        PERFORM outbox.refuse_position(of_type, of_id, last, taken);
    END IF;
    RETURN taken;
END
$$;

-- Appends the event of one aggregate, whose chain is locked at `place` and stands as outbox.take_touched said, if there is
-- something to say. Returns whether there was. It has no settings: names and operators are qualified.
CREATE FUNCTION outbox.append_touched(of_capture integer, key text, place tid, version bigint, state text, present boolean,
                                      body text) RETURNS boolean
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
#variable_conflict use_column
DECLARE
    had      constant pg_catalog.int8 := version;
    was      constant pg_catalog.text := state;
    event_id constant pg_catalog.uuid := outbox.uuid7();
    becomes  pg_catalog.text := 'live';
    told     pg_catalog.text := 'changed';
    hash     pg_catalog.bytea;
    taken    pg_catalog.record;
BEGIN
    IF present THEN
        IF body IS NULL OR body OPERATOR(pg_catalog.=) 'null'
           OR pg_catalog.octet_length(body) OPERATOR(pg_catalog.>) 16777216
           OR key OPERATOR(pg_catalog.=) '' OR pg_catalog.octet_length(key) OPERATOR(pg_catalog.>) 255 THEN
            PERFORM outbox.refuse_captured(c.aggregate_type, append_touched.key, append_touched.present, append_touched.body)
            FROM outbox.captured_type c WHERE c.capture OPERATOR(pg_catalog.=) of_capture;
        END IF;
        hash := pg_catalog.sha256(pg_catalog.convert_to(body, 'UTF8'));
        IF had OPERATOR(pg_catalog.=) 0 OR was OPERATOR(pg_catalog.<>) 'live' THEN
            told := 'new';
        END IF;
    ELSIF was OPERATOR(pg_catalog.=) 'ended' THEN
        RETURN false;
    ELSE
        told := 'deleted';
        becomes := 'ended';
        body := pg_catalog.json_build_object('id', key)::pg_catalog.text;
    END IF;
    UPDATE outbox.aggregate a
    SET version = a.version OPERATOR(pg_catalog.+) 1, previous_event_id = a.last_event_id, last_event_id = event_id,
        last_position = outbox.next_position_above(a.last_position, a.aggregate_type, a.aggregate_id), state = becomes,
        body_hash = hash
    WHERE a.ctid OPERATOR(pg_catalog.=) place AND a.aggregate_id OPERATOR(pg_catalog.=) key
      AND a.aggregate_type OPERATOR(pg_catalog.=) (SELECT c.aggregate_type FROM outbox.captured_type c
                                                   WHERE c.capture OPERATOR(pg_catalog.=) of_capture)
      AND a.version OPERATOR(pg_catalog.=) had AND a.state OPERATOR(pg_catalog.=) was
      AND (told OPERATOR(pg_catalog.<>) 'changed' OR a.body_hash IS NULL OR a.body_hash OPERATOR(pg_catalog.<>) hash)
    RETURNING a.aggregate_type AS of_type, a.version, a.previous_event_id, a.last_position INTO taken;
    IF NOT FOUND THEN
        -- Its last event says the same; or, if the body function wrote to the chain itself, the row has another place.
        PERFORM outbox.append_captured(of_capture, append_touched.key, a.ctid, append_touched.present, append_touched.body)
        FROM outbox.aggregate a JOIN outbox.captured_type c ON c.aggregate_type OPERATOR(pg_catalog.=) a.aggregate_type
        WHERE c.capture OPERATOR(pg_catalog.=) of_capture AND a.aggregate_id OPERATOR(pg_catalog.=) key
          AND (a.ctid OPERATOR(pg_catalog.<>) place OR a.version OPERATOR(pg_catalog.<>) had
               OR a.state OPERATOR(pg_catalog.<>) was);
        RETURN FOUND;
    END IF;
    -- A chain that is unknown has a version that a single subscriber was told. Its next event is flagged as a baseline.
    INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
    VALUES (taken.last_position, event_id, taken.of_type, key, taken.version,
            taken.of_type OPERATOR(pg_catalog.||) '.' OPERATOR(pg_catalog.||) told, body::pg_catalog.json,
            CASE WHEN told OPERATOR(pg_catalog.=) 'new' AND was OPERATOR(pg_catalog.=) 'unknown'
                      AND had OPERATOR(pg_catalog.>) 0 THEN '{"baseline": true}'::pg_catalog.jsonb END,
            taken.previous_event_id);
    RETURN true;
END
$$;
REVOKE EXECUTE ON FUNCTION
    outbox.take_touched(integer), outbox.append_touched(integer, text, tid, bigint, text, boolean, text),
    outbox.next_position_above(bigint, text, text)
FROM PUBLIC;

-- Makes the functions of a captured type, as before; but publish_N reads a single aggregate itself.
CREATE OR REPLACE FUNCTION outbox.make_captured_type(captured outbox.captured_type, owner regrole) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $outer$
DECLARE
    of_capture constant integer := captured.capture;
    called   constant regprocedure := captured.body;
    -- Not how a body looks, nor what is in it, depends on the writer; and its plan uses the indexes of keys.
    settings constant text :=
        'SET row_security = off SET timezone = ''UTC'' SET datestyle = ''ISO, YMD'' SET intervalstyle = ''iso_8601'' '
        'SET bytea_output = ''hex'' SET extra_float_digits = 1 SET lc_monetary = ''C'' '
        'SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off '
        'SET plan_cache_mode = force_generic_plan';
    columns  record;
    relayer  regrole;
    body     text;
    failed   text;
    left_out text := '';
BEGIN
    -- With %1$s for the key.
    SELECT string_agg(format('o.%I = %s::%s', c.name, c.part, format_type(c.type, NULL)), ' AND ' ORDER BY c.n) AS found,
           string_agg(format('%s::%s', c.part, format_type(p.proargtypes[c.n - 1], NULL)), ', ' ORDER BY c.n) AS given
    INTO columns
    FROM (SELECT k.n, replace(a.attname, '%', '%%') AS name, outbox.base_type(a.atttypid) AS type,
                 CASE cardinality(t.key_columns) WHEN 1 THEN '%1$s' ELSE format('(%%1$s::json ->> %s)', k.n - 1) END AS part
          FROM outbox.captured_table t
          CROSS JOIN unnest(t.key_columns) WITH ORDINALITY AS k (attnum, n)
          JOIN pg_attribute a ON a.attrelid = t.relation AND a.attnum = k.attnum
          WHERE t.capture = of_capture AND t.relation = captured.root) AS c
    LEFT JOIN pg_proc p ON p.oid = called;
    IF called IS NOT NULL THEN
        body := format('%s(%s)', replace(called::oid::regproc::text, '%', '%%'), columns.given);
    ELSIF captured.left_out = '{}' THEN
        body := 'row_to_json(o)';
    ELSE
        body := '(SELECT concat(''{'', string_agg(concat(to_json(f.key), '':'', f.value), '','' ORDER BY f.n), ''}'') '
                'FROM json_each(row_to_json(o)) WITH ORDINALITY AS f (key, value, n) WHERE f.key <> ALL (left_out))';
    END IF;
    body := format('SELECT %s::text AS body FROM %s AS o WHERE %s LIMIT 1', body, replace(captured.root_name, '%', '%%'),
                   columns.found);
    IF captured.left_out <> '{}' THEN
        left_out := format($$
DECLARE
    left_out constant text[] := ARRAY(SELECT a.attname::text FROM pg_attribute a
                                      WHERE a.attrelid = %L::regclass AND a.attnum = ANY (%L));$$,
                           captured.root_name, captured.left_out);
    END IF;
    failed := format($$
EXCEPTION WHEN undefined_table OR undefined_column OR undefined_function THEN
    RAISE EXCEPTION 'the captured aggregate type %% cannot be read: %%', %L, SQLERRM
        USING ERRCODE = SQLSTATE,
              HINT = %L;
$$, captured.aggregate_type, format(
        'A table, a column or a function that it needs was dropped or renamed. Correct the body function, or call '
        'outbox.capture again for the table %s.', captured.root_name));
    PERFORM outbox.make_captured(
        format('read_%s(keys text[]) RETURNS TABLE (key text, present boolean, body text)', of_capture),
        settings,
        format($$
#variable_conflict use_column
%2$s
BEGIN
    RETURN QUERY
    SELECT k.key, r.present IS TRUE, r.body
    FROM unnest(keys) AS k (key)
    LEFT JOIN LATERAL (SELECT true AS present, b.body FROM (%1$s) AS b) AS r ON true;
%3$sEND
$$, format(body, 'k.key'), left_out, failed),
        owner, false);
    PERFORM outbox.make_captured(
        format('append_%s(of_keys text[], states boolean) RETURNS bigint', of_capture), '',
        format($$
DECLARE
    one      record;
    keys     text[];
    present  boolean[];
    bodies   text[];
    bytes    bigint := 0;
    appended bigint := 0;
BEGIN
    FOR one IN SELECT r.key, r.present, r.body FROM outbox_capture.read_%1$s(of_keys) AS r LOOP
        keys := keys || one.key;
        present := present || one.present;
        bodies := bodies || one.body;
        bytes := bytes + coalesce(octet_length(one.body), 0);
        IF bytes > 8000000 THEN
            appended := appended + outbox.append_captured(%1$s, keys, present, bodies, states);
            keys := NULL;
            present := NULL;
            bodies := NULL;
            bytes := 0;
        END IF;
    END LOOP;
    IF keys IS NOT NULL THEN
        appended := appended + outbox.append_captured(%1$s, keys, present, bodies, states);
    END IF;
    RETURN appended;
END
$$, of_capture), owner, false);
    -- One aggregate is read here: it is what most transactions touch.
    PERFORM outbox.make_captured(
        format('publish_%s() RETURNS void', of_capture), settings,
        format($$
#variable_conflict use_variable
DECLARE
    taken        record;
    outbox_key   text;
    outbox_body  text;
    outbox_found boolean;
    page         text[];
BEGIN
    taken := outbox.take_touched(%1$s);
    -- Read after the lock, by a later statement, which sees what was committed before.
    IF taken.key IS NOT NULL THEN
        outbox_key := taken.key;
        %2$s
        BEGIN
            SELECT b.body INTO outbox_body FROM (%3$s) AS b;
            outbox_found := FOUND;%4$s
        END;
        outbox_found := outbox.append_touched(%1$s, outbox_key, taken.place, taken.version, taken.state, outbox_found,
                                              outbox_body);
    ELSIF taken.keys IS NOT NULL THEN
        LOOP
            page := outbox.next_touched(taken.keys);
            EXIT WHEN page IS NULL;
            PERFORM outbox_capture.append_%1$s(page, false);
        END LOOP;
    END IF;
END
$$, of_capture, left_out, format(body, 'outbox_key'), failed), owner, true);
    PERFORM outbox.make_captured(
        format('state_%s(keys text[], silently boolean) RETURNS bigint', of_capture), '',
        format($$
BEGIN
    PERFORM outbox.lock_captured(%1$s, keys);
    IF silently THEN
        RETURN outbox.begin_captured(%1$s, (SELECT array_agg(r.key) FROM outbox_capture.read_%1$s(keys) AS r WHERE r.present));
    END IF;
    RETURN outbox_capture.append_%1$s(keys, true);
END
$$, of_capture), owner, false);
    PERFORM outbox.make_captured(
        format('keys_%s(after text, most bigint) RETURNS SETOF text', of_capture),
        'SET row_security = off SET enable_seqscan = off SET plan_cache_mode = force_custom_plan',
        format('BEGIN RETURN QUERY %s; END', outbox.captured_keys_query(captured, 'true')), owner, false);
    FOR relayer IN
        SELECT r.grantee FROM pg_class c, aclexplode(c.relacl) r
        WHERE c.oid = 'outbox.parked'::regclass AND r.privilege_type = 'INSERT' AND r.grantee NOT IN (0, c.relowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION outbox_capture.read_%1$s, outbox_capture.state_%1$s, '
                       'outbox_capture.keys_%1$s TO %2$s', of_capture, relayer);
    END LOOP;
END
$outer$;

-- Makes the trigger functions of a captured table, and the triggers, as before; but what a single row changes is found by one
-- pass over it.
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
               c.definition, g.tgenabled
        FROM t CROSS JOIN (VALUES
            ('insert', 'AFTER INSERT ON %2$s REFERENCING NEW TABLE AS outbox_rows'),
            ('update', 'AFTER UPDATE ON %2$s REFERENCING OLD TABLE AS outbox_old_rows NEW TABLE AS outbox_rows'),
            ('delete', 'AFTER DELETE ON %2$s REFERENCING OLD TABLE AS outbox_rows'),
            ('truncate', 'BEFORE TRUNCATE ON %2$s')) AS c (action, definition)
        LEFT JOIN pg_trigger g ON g.tgrelid = t.relation AND g.tgname = format('outbox_capture_%s_%s', of_number, c.action)
        JOIN pg_class r ON r.oid = t.relation AND r.relkind IN ('r', 'p')
        WHERE g.tgenabled IS DISTINCT FROM 'O'
    LOOP
        IF made.tgenabled IS NULL THEN
            EXECUTE format('CREATE TRIGGER %1$I ' || made.definition || ' EXECUTE FUNCTION outbox_capture.touch_%3$s_%4$s()',
                           made.name, made.relation, of_number, made.action);
        ELSE
            EXECUTE format('ALTER TABLE ONLY %s ENABLE TRIGGER %I', made.relation, made.name);
        END IF;
    END LOOP;
END
$outer$;

-- What the owner of captured tables needs and no more, as before.
CREATE OR REPLACE FUNCTION outbox.grant_capture(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
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
SELECT outbox.grant_capture(r.grantee::regrole)
FROM pg_attribute a, aclexplode(a.attacl) r
WHERE a.attrelid = 'outbox.touched'::regclass AND a.attname = 'keys' AND r.privilege_type = 'INSERT'
  AND r.grantee NOT IN (0, (SELECT c.relowner FROM pg_class c WHERE c.oid = a.attrelid));

-- What is captured already gets the new functions where this role may make them, and where no trigger was disabled: making
-- them enables it. The others go on with those that they have, until outbox.capture is called again.
DO $$
DECLARE
    part record;
BEGIN
    FOR part IN
        SELECT t AS part, c AS captured, t.relation = c.root AS is_root, r.relowner::regrole AS owner
        FROM outbox.captured_table t JOIN outbox.captured_type c ON c.capture = t.capture
        JOIN pg_class r ON r.oid = t.relation
        WHERE pg_has_role(r.relowner, 'MEMBER') AND to_regclass(t.name) = t.relation
          AND t.key_names = (SELECT array_agg(a.attname::text ORDER BY k.n)
                             FROM unnest(t.key_columns) WITH ORDINALITY AS k (attnum, n)
                             JOIN pg_attribute a ON a.attrelid = t.relation AND a.attnum = k.attnum)
          AND (c.body IS NULL OR to_regprocedure(c.body) IS NOT NULL)
          AND NOT EXISTS (SELECT FROM pg_trigger g
                          WHERE g.tgenabled <> 'O' AND starts_with(g.tgname, format('outbox_capture_%s_', t.number)))
    LOOP
        IF part.is_root THEN
            PERFORM outbox.make_captured_type(part.captured, part.owner);
        END IF;
        PERFORM outbox.make_captured_table(part.part, part.is_root, part.owner);
    END LOOP;
END
$$;

-- outbox.capture: a service publishes whole aggregates without a line of code. Triggers of its tables note which
-- aggregates a transaction touches; at COMMIT, each of them is locked, read once, and published if it differs from its last
-- event.
--
-- Three roles take part, and none gets the rights of another:
--   the writer, who changes the tables. It needs no right on the outbox.
--   the owner of the captured tables. The generated functions belong to it and run with its rights (SECURITY DEFINER): they
--     read the tables and call the body function, which the owner may replace at any time.
--   the owner of the schema outbox. Its functions lock chains and append events. They never call what belongs to others.

-- The generated functions are in a schema of their own. From the first capture on everybody may use it: what the triggers call
-- publishes only what the transaction has touched, and a writer needs no right on the schema outbox. The owners of captured tables may create there.
-- What an outbox that was dropped has left of it calls functions that are gone.
DO $$
BEGIN
    IF to_regnamespace('outbox_capture') IS NOT NULL THEN
        DROP SCHEMA outbox_capture CASCADE;
    END IF;
END
$$;
CREATE SCHEMA outbox_capture;
COMMENT ON SCHEMA outbox_capture IS
    'Functions that outbox.capture generates. Do not change them: call outbox.capture again.';

-- Each captured aggregate type.
--   root         the table with one row for each aggregate, and root_name, its name when it was captured. A table that was
--                renamed, or swapped for another, is one that is not captured.
--   body         the function that returns the body, with its argument types; null: the body is the root's row.
--   left_out     columns that the row's body lacks, by number, so that a renamed column stays out.
CREATE TABLE outbox.captured_type (
    capture        integer    PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    aggregate_type text       COLLATE "C" NOT NULL UNIQUE,
    root           regclass   NOT NULL,
    root_name      text       NOT NULL,
    body           text,
    left_out       smallint[] NOT NULL DEFAULT '{}'
);

-- Each table of a captured aggregate type, with the columns that hold the aggregate's key, by number and by name. The
-- generated functions name them; a column with another name or number means that the capture has to be made again.
CREATE TABLE outbox.captured_table (
    number      integer    NOT NULL UNIQUE GENERATED ALWAYS AS IDENTITY,
    capture     integer    NOT NULL REFERENCES outbox.captured_type,
    relation    regclass   NOT NULL,
    name        text       NOT NULL,
    key_columns smallint[] NOT NULL,
    key_names   text[]     NOT NULL,
    PRIMARY KEY (capture, relation)
);

-- What the transactions under way have touched: at most 1,000 keys a row, each at most once in a statement.
--   lived   of rows of the root: 1, the statement removed these keys; -1, it added them; 0, neither, or the row of a child.
--           The sum over a transaction tells whether an aggregate without events had lived before it.
-- Unlogged: COMMIT (or PREPARE TRANSACTION) deletes a transaction's rows, and a crash has no use for them. The index is a
-- hash: on a btree, the transactions of a SERIALIZABLE application meet at its last page, and most of them fail.
CREATE UNLOGGED TABLE outbox.touched (
    xid     xid8     NOT NULL DEFAULT pg_current_xact_id(),
    capture integer  NOT NULL,
    lived   smallint NOT NULL,
    keys    text[]   COLLATE "C" NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 2000000000,
        toast.autovacuum_vacuum_threshold = 1000);
-- A new hash index has two buckets, and grows with the rows that it has at one time, which are few here. Transactions in the
-- same bucket are in each other's way, so it begins with about a thousand.
INSERT INTO outbox.touched (xid, capture, lived, keys) SELECT n::text::xid8, 0, 0, '{}' FROM generate_series(1, 40000) n;
CREATE INDEX touched_xid ON outbox.touched USING hash (xid) WITH (fillfactor = 10);
DELETE FROM outbox.touched;

-- Whether a row is still there. Others of the transaction were published with the first one.
-- Every writer's COMMIT calls it, so it has no settings, and names and operators are qualified.
CREATE FUNCTION outbox_capture.is_left(place tid) RETURNS boolean
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
BEGIN
    RETURN EXISTS (SELECT FROM outbox.touched t
                   WHERE t.ctid OPERATOR(pg_catalog.=) place
                     AND t.xid OPERATOR(pg_catalog.=) pg_catalog.pg_current_xact_id());
END
$$;

-- Runs at COMMIT for each row of outbox.touched, with the rights of the writer or, from PostgreSQL 18 on, of the owner of the
-- captured table. So what it calls, which that owner may replace, gets no rights that a trigger of the table would not have.
CREATE FUNCTION outbox.publish_touched() RETURNS trigger
    LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF outbox_capture.is_left(NEW.ctid) THEN
        EXECUTE pg_catalog.concat('SELECT outbox_capture.publish_', NEW.capture, '()');
    END IF;
    RETURN NULL;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.publish_touched(), outbox_capture.is_left(tid) FROM PUBLIC;

-- One trigger for all captures: a further capture changes nothing here, and waits for nobody.
CREATE CONSTRAINT TRIGGER publish_touched AFTER INSERT ON outbox.touched
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION outbox.publish_touched();
ALTER TABLE outbox.touched ENABLE ALWAYS TRIGGER publish_touched;

-- The type of a capture, and why it does not work, if it does not: its table is another one now, or the outbox no longer
-- counts its versions.
CREATE FUNCTION outbox.capture_type(of_capture integer) RETURNS text
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    captured pg_catalog.record;
BEGIN
    -- outbox.number_by waits for who has this lock, and comes before or after the events, and not in between.
    PERFORM pg_catalog.pg_advisory_xact_lock_shared(1869968482, 1);
    -- Asked in the catalog: to_regclass() would need rights on the schema of the table.
    SELECT c.aggregate_type, c.root_name, t.numbered_by,
           EXISTS (SELECT FROM pg_catalog.pg_class r
                   JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) r.relnamespace
                   WHERE r.oid OPERATOR(pg_catalog.=) c.root::pg_catalog.oid
                     AND pg_catalog.format('%I.%I', n.nspname, r.relname) OPERATOR(pg_catalog.=) c.root_name) AS is_there
    INTO captured
    FROM outbox.captured_type c
    LEFT JOIN outbox.aggregate_type t ON t.aggregate_type OPERATOR(pg_catalog.=) c.aggregate_type
    WHERE c.capture OPERATOR(pg_catalog.=) of_capture;
    IF captured.is_there AND captured.numbered_by OPERATOR(pg_catalog.=) 'outbox' THEN
        RETURN captured.aggregate_type;
    ELSIF captured.aggregate_type IS NULL THEN
        RAISE EXCEPTION 'there is no capture %', of_capture
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Repeat the transaction.';
    ELSIF captured.is_there IS NOT TRUE THEN
        RAISE EXCEPTION 'the table % of the captured aggregate type % was dropped, renamed or replaced by another',
                        captured.root_name, captured.aggregate_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = pg_catalog.format('Capture the table that has its rows now: SELECT outbox.uncapture_type(%L); and then '
                                           'outbox.capture for each table of the aggregate.', captured.aggregate_type);
    END IF;
    RAISE EXCEPTION 'the writers of the captured type % count its versions themselves', captured.aggregate_type
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = pg_catalog.format('SELECT outbox.number_by(%L, ''outbox''), as the owner of the schema outbox, or '
                                       'outbox.uncapture_type.', captured.aggregate_type);
END
$$;

-- Locks the chains of everything that the transaction has touched, of all types together, in the order of type and key; then
-- takes what it touched of one capture. Returns the one key with the place of its chain's row, or a cursor over the keys;
-- nothing if there are none.
--
-- To lock is to UPDATE, whatever is published later: otherwise a transaction in REPEATABLE READ with an older snapshot would
-- not notice this one, and its last body would be wrong for ever. A chain without events has version 0 and stays, for the
-- same reason; it is ended, or unknown if the aggregate had lived before it was captured.
CREATE FUNCTION outbox.take_many(of_capture integer, of_type text, OUT key text, OUT place tid, OUT keys refcursor)
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    mine constant xid8 := pg_current_xact_id();
    seen record;
BEGIN
    SELECT min(t.capture) AS first_capture, max(t.capture) AS last_capture, min(k.key) AS first_key, max(k.key) AS last_key,
           sum(t.lived) AS lived, bool_or(t.capture = of_capture) AS found
    INTO seen FROM outbox.touched t, unnest(t.keys) AS k (key) WHERE t.xid = mine;
    IF seen.found IS NOT TRUE THEN
        RETURN;
    END IF;
    IF seen.first_key = seen.last_key AND seen.first_capture = seen.last_capture THEN
        key := seen.first_key;
        place := outbox.lock_touched(of_type, key, seen.lived > 0);
    ELSE
        INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
        SELECT c.aggregate_type, k.key, 0, '00000000-0000-0000-0000-000000000000', 0,
               CASE WHEN sum(t.lived) > 0 THEN 'unknown' ELSE 'ended' END
        FROM outbox.touched t, unnest(t.keys) AS k (key), outbox.captured_type c
        WHERE t.xid = mine AND c.capture = t.capture
        GROUP BY c.aggregate_type, k.key ORDER BY c.aggregate_type, k.key
        ON CONFLICT ON CONSTRAINT aggregate_pkey DO UPDATE
        SET version = a.version, state = CASE a.version WHEN 0 THEN excluded.state ELSE a.state END;
        OPEN keys NO SCROLL FOR
            SELECT DISTINCT k.key FROM outbox.touched t, unnest(t.keys) AS k (key)
            WHERE t.xid = mine AND t.capture = of_capture ORDER BY k.key;
    END IF;
    DELETE FROM outbox.touched t WHERE t.xid = mine AND t.capture = of_capture;
END
$$;

-- Locks one chain, and returns the place of its row.
CREATE FUNCTION outbox.lock_touched(of_type text, key text, lived boolean) RETURNS tid
    LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    place pg_catalog.tid;
BEGIN
    INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
    VALUES (of_type, key, 0, '00000000-0000-0000-0000-000000000000', 0, CASE WHEN lived THEN 'unknown' ELSE 'ended' END)
    ON CONFLICT ON CONSTRAINT aggregate_pkey DO UPDATE
    SET version = a.version,
        state = CASE WHEN a.version OPERATOR(pg_catalog.=) 0 THEN excluded.state ELSE a.state END
    RETURNING a.ctid INTO place;
    RETURN place;
END
$$;

-- The short way for a transaction with one statement on one aggregate. It has no settings: names and operators are qualified.
CREATE FUNCTION outbox.take_touched(of_capture integer, OUT key text, OUT place tid, OUT keys refcursor)
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    of_type constant pg_catalog.text := outbox.capture_type(of_capture);
    mine    constant pg_catalog.xid8 := pg_catalog.pg_current_xact_id();
    lived   pg_catalog.int4;
    many    pg_catalog.record;
BEGIN
    DELETE FROM outbox.touched t
    WHERE t.xid OPERATOR(pg_catalog.=) mine AND t.capture OPERATOR(pg_catalog.=) of_capture
      AND pg_catalog.cardinality(t.keys) OPERATOR(pg_catalog.=) 1
      AND NOT EXISTS (SELECT FROM outbox.touched o
                      WHERE o.xid OPERATOR(pg_catalog.=) mine AND o.ctid OPERATOR(pg_catalog.<>) t.ctid)
    RETURNING t.keys[1], t.lived INTO key, lived;
    IF key IS NOT NULL THEN
        place := outbox.lock_touched(of_type, key, lived OPERATOR(pg_catalog.>) 0);
    ELSE
        SELECT m.key, m.place, m.keys INTO many FROM outbox.take_many(of_capture, of_type) AS m;
        key := many.key;
        place := many.place;
        keys := many.keys;
    END IF;
END
$$;

-- The next keys of a cursor, at most 1,000; null after the last one.
CREATE FUNCTION outbox.next_touched(of_keys refcursor) RETURNS text[]
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    next_key text;
    taken    text[];
BEGIN
    FOR n IN 1..1000 LOOP
        FETCH of_keys INTO next_key;
        IF NOT FOUND THEN
            EXIT;
        END IF;
        taken := taken || next_key;
    END LOOP;
    IF taken IS NULL THEN
        CLOSE of_keys;
    END IF;
    RETURN taken;
END
$$;

-- Locks chains by their keys, for who publishes states.
CREATE FUNCTION outbox.lock_captured(of_capture integer, keys text[]) RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    of_type constant text := outbox.capture_type(of_capture);
BEGIN
    INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
    SELECT of_type, k.key, 0, '00000000-0000-0000-0000-000000000000', 0, 'ended'
    FROM (SELECT DISTINCT u.key COLLATE "C" AS key FROM unnest(keys) AS u (key)) AS k
    WHERE k.key IS NOT NULL ORDER BY k.key
    ON CONFLICT ON CONSTRAINT aggregate_pkey DO UPDATE SET version = a.version;
END
$$;

-- Says what keeps an aggregate from being published, if anything does.
CREATE FUNCTION outbox.refuse_captured(of_type text, key text, present boolean, body text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF octet_length(key) NOT BETWEEN 1 AND 255 THEN
        RAISE EXCEPTION 'an aggregate of the captured type % has a key of % bytes', of_type, octet_length(key)
            USING ERRCODE = 'invalid_parameter_value', HINT = 'A key has 1 to 255 bytes.';
    ELSIF present AND (body IS NULL OR body = 'null') THEN
        RAISE EXCEPTION 'the body function % returned null for %/%, whose row exists',
                        (SELECT c.body FROM outbox.captured_type c WHERE c.aggregate_type = of_type), of_type, key
            USING ERRCODE = 'null_value_not_allowed',
                  HINT = 'It has to return a body for each row of the captured table. Look for an inner join that finds '
                         'nothing, and for row security. A deletion is published only if the row itself is gone.';
    ELSIF octet_length(body) > 16777216 THEN
        RAISE EXCEPTION 'the body of %/% has % bytes', of_type, key, octet_length(body)
            USING ERRCODE = 'program_limit_exceeded', HINT = 'A body has at most 16777216 bytes. Leave something out of it.';
    END IF;
END
$$;

-- Appends the event of one aggregate, whose chain is locked at `place`, if there is something to say.
--
-- A chain that is unknown has a version that a single subscriber was told (outbox.begin_captured), and others were not. Its
-- next event is flagged as a baseline, which it is: it has the whole state. So whoever has nothing of the chain takes it.
CREATE FUNCTION outbox.append_captured(of_capture integer, key text, place tid, present boolean, body text) RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    chain   outbox.aggregate;
    of_type text;
    hash    bytea;
    told    text;
    written record;
BEGIN
    SELECT a.* INTO chain FROM outbox.aggregate a
    WHERE a.ctid = place AND a.aggregate_id = key
      AND a.aggregate_type = (SELECT c.aggregate_type FROM outbox.captured_type c WHERE c.capture = of_capture);
    of_type := chain.aggregate_type;
    IF present THEN
        IF body IS NULL OR body = 'null' OR octet_length(body) > 16777216 OR octet_length(key) NOT BETWEEN 1 AND 255 THEN
            PERFORM outbox.refuse_captured(of_type, key, present, body);
        END IF;
        hash := sha256(convert_to(body, 'UTF8'));
        IF chain.version = 0 OR chain.state <> 'live' THEN
            told := 'new';
        ELSIF hash IS DISTINCT FROM chain.body_hash THEN
            told := 'changed';
        END IF;
    ELSIF chain.state <> 'ended' THEN
        told := 'deleted';
        body := json_build_object('id', key)::text;
    END IF;
    IF told IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
    VALUES (of_type, key, chain.version + 1, of_type || '.' || told, body::json,
            CASE WHEN told = 'new' AND chain.state = 'unknown' AND chain.version > 0 THEN '{"baseline": true}'::jsonb END,
            chain.last_event_id)
    RETURNING id, position INTO written;
    UPDATE outbox.aggregate a
    SET version = a.version + 1, previous_event_id = a.last_event_id, last_event_id = written.id,
        last_position = written.position, body_hash = hash, state = CASE told WHEN 'deleted' THEN 'ended' ELSE 'live' END
    WHERE a.ctid = place AND a.aggregate_type = of_type AND a.aggregate_id = key AND a.version = chain.version
      AND a.last_position < written.position;
    IF NOT FOUND THEN
        PERFORM outbox.refuse_position(of_type, key, chain.last_position, written.position);
    END IF;
END
$$;

-- The same of many, whose chains are locked. With `states`, each that exists is told as a baseline, whether it differs or not.
-- Returns how many events that were.
CREATE FUNCTION outbox.append_captured(of_capture integer, keys text[], present boolean[], bodies text[], states boolean)
    RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    of_type constant text :=
        (SELECT c.aggregate_type FROM outbox.captured_type c WHERE c.capture = of_capture);
    appended bigint;
    lasting  bigint;
    last_one record;
BEGIN
    PERFORM outbox.refuse_captured(of_type, k.key, k.present, k.body)
    FROM unnest(keys, present, bodies) AS k (key, present, body)
    WHERE k.present AND (k.body IS NULL OR k.body = 'null' OR octet_length(k.body) > 16777216
                         OR octet_length(k.key) NOT BETWEEN 1 AND 255);
    WITH come AS MATERIALIZED (
        SELECT a.aggregate_id, a.version, a.last_event_id, k.n,
               CASE WHEN k.present THEN k.body ELSE json_build_object('id', k.key)::text END AS body,
               CASE WHEN states AND k.present THEN 'baseline'
                    WHEN k.present AND (a.version = 0 OR a.state <> 'live') THEN 'new'
                    WHEN k.present AND sha256(convert_to(k.body, 'UTF8')) IS DISTINCT FROM a.body_hash THEN 'changed'
                    WHEN NOT k.present AND a.state <> 'ended' THEN 'deleted' END AS told,
               a.state = 'unknown' AND a.version > 0 AS is_unknown
        FROM unnest(keys, present, bodies) WITH ORDINALITY AS k (key, present, body, n)
        JOIN outbox.aggregate a ON a.aggregate_type = of_type AND a.aggregate_id = k.key
    ), written AS (
        INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
        SELECT of_type, c.aggregate_id, c.version + 1, of_type || '.' || c.told, c.body::json,
               CASE WHEN c.told = 'baseline' OR c.told = 'new' AND c.is_unknown THEN '{"baseline": true}'::jsonb END,
               c.last_event_id
        FROM come c WHERE c.told IS NOT NULL ORDER BY c.n
        RETURNING event.aggregate_id, event.version, event.id, event.position, event.type, event.payload::text AS body
    ), kept AS (
        UPDATE outbox.aggregate a
        SET version = w.version, previous_event_id = a.last_event_id, last_event_id = w.id, last_position = w.position,
            state = CASE w.type WHEN of_type || '.deleted' THEN 'ended' ELSE 'live' END,
            body_hash = CASE w.type WHEN of_type || '.deleted' THEN NULL ELSE sha256(convert_to(w.body, 'UTF8')) END
        FROM written w
        WHERE a.aggregate_type = of_type AND a.aggregate_id = w.aggregate_id AND a.version = w.version - 1
          AND a.last_position < w.position
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM written), (SELECT count(*) FROM kept) INTO appended, lasting;
    IF lasting < appended THEN
        SELECT a.aggregate_id, a.last_position INTO last_one FROM outbox.aggregate a
        WHERE a.aggregate_type = of_type AND a.aggregate_id = ANY (keys) ORDER BY a.last_position DESC LIMIT 1;
        PERFORM outbox.refuse_position(of_type, last_one.aggregate_id, last_one.last_position,
                                       (SELECT p.last_value FROM outbox.position p));
    END IF;
    RETURN appended;
END
$$;

-- A position lies above that of the aggregate's last event, which a chain's lock makes certain; except where the sequence is
-- behind, or the chain was not locked.
CREATE FUNCTION outbox.refuse_position(of_type text, key text, last_position bigint, came bigint) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'the next position is %, and the last event of %/% has %', came, of_type, key, last_position
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'The sequence outbox.position is behind: run outbox-relay recover --sequence.';
END
$$;

-- Begins the chains of aggregates that have had no event, for who tells their states to one subscriber alone: with version
-- 1 and the id of an event that the outbox does not have. Returns how many these were.
CREATE FUNCTION outbox.begin_captured(of_capture integer, keys text[]) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    begun bigint;
BEGIN
    UPDATE outbox.aggregate a SET version = 1, last_event_id = outbox.uuid7(), state = 'unknown', body_hash = NULL
    FROM unnest(keys) AS k (key), outbox.captured_type c
    WHERE c.capture = of_capture AND a.aggregate_type = c.aggregate_type AND a.aggregate_id = k.key AND a.version = 0;
    GET DIAGNOSTICS begun = ROW_COUNT;
    RETURN begun;
END
$$;

-- Says that the outbox counts the versions of a type from now on, or why it does not.
CREATE FUNCTION outbox.claim_type(of_type text) RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    counter text;
BEGIN
    INSERT INTO outbox.aggregate_type (aggregate_type, numbered_by)
    SELECT of_type, 'outbox' WHERE (SELECT s.adopts_chains FROM outbox.source s) IS NOT TRUE
    ON CONFLICT DO NOTHING;
    SELECT t.numbered_by INTO counter FROM outbox.aggregate_type t WHERE t.aggregate_type = of_type;
    IF counter = 'writer' THEN
        RAISE EXCEPTION 'the writers of the type % count its versions themselves, and a captured type has those of the outbox',
                        of_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Remove the code that inserts its events. Then, as the owner of the schema outbox: SELECT '
                                'outbox.number_by(%L, ''outbox'').', of_type);
    ELSIF counter IS NULL THEN
        RAISE EXCEPTION 'the outbox does not know whether the type % had events', of_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Its history had been retired before it counted versions. As the owner of the schema outbox, '
                                'say that it counts them: SELECT outbox.number_by(%L, ''outbox'').', of_type);
    END IF;
END
$$;

REVOKE EXECUTE ON FUNCTION
    outbox.capture_type(integer), outbox.take_touched(integer), outbox.take_many(integer, text),
    outbox.lock_touched(text, text, boolean), outbox.next_touched(refcursor),
    outbox.lock_captured(integer, text[]), outbox.refuse_captured(text, text, boolean, text),
    outbox.append_captured(integer, text, tid, boolean, text),
    outbox.append_captured(integer, text[], boolean[], text[], boolean), outbox.begin_captured(integer, text[]),
    outbox.refuse_position(text, text, bigint, bigint), outbox.claim_type(text)
FROM PUBLIC;

-- A type without its domains.
CREATE FUNCTION outbox.base_type(of_type oid) RETURNS regtype
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE t (type, base) AS (
        SELECT p.oid, p.typbasetype FROM pg_type p WHERE p.oid = of_type
        UNION ALL
        SELECT p.oid, p.typbasetype FROM t JOIN pg_type p ON p.oid = t.base)
    SELECT t.type::regtype FROM t WHERE t.base = 0
$$;

-- The columns of a key, `id` or `tenant, id`, with the rules that they have to keep.
CREATE FUNCTION outbox.key_columns(of_table regclass, key text) RETURNS TABLE (n bigint, attnum smallint, name text, type regtype)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    wanted record;
BEGIN
    IF key IS NULL OR trim(key) = '' THEN
        RAISE EXCEPTION 'the argument key of outbox.capture is empty'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = format('Name the column of %s that has the id of the aggregate; several with commas: ''tenant, id''.',
                                of_table);
    END IF;
    FOR wanted IN
        SELECT c.n, trim(c.name) AS name, a.attnum, outbox.base_type(a.atttypid) AS type, l.collisdeterministic, a.atttypid
        FROM string_to_table(key, ',') WITH ORDINALITY AS c (name, n)
        LEFT JOIN pg_attribute a ON a.attrelid = of_table AND a.attname = trim(c.name) AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_collation l ON l.oid = a.attcollation
        ORDER BY c.n
    LOOP
        IF wanted.attnum IS NULL THEN
            RAISE EXCEPTION 'the table % has no column %, which is named as its key', of_table, wanted.name
                USING ERRCODE = 'undefined_column', HINT = 'Name columns as they are stored: without quotes, in their case.';
        ELSIF wanted.type NOT IN ('smallint', 'integer', 'bigint', 'uuid', 'text', 'varchar') THEN
            RAISE EXCEPTION 'the key column % of % has the type %', wanted.name, of_table, format_type(wanted.atttypid, NULL)
                USING ERRCODE = 'datatype_mismatch',
                      HINT = 'A key is an integer, a uuid or a text. Other types have equal values with different texts, such '
                             'as 1 and 1.0, which would be two aggregates.';
        ELSIF wanted.collisdeterministic IS FALSE THEN
            RAISE EXCEPTION 'the key column % of % has a nondeterministic collation', wanted.name, of_table
                USING ERRCODE = 'datatype_mismatch',
                      HINT = 'Texts that differ would be equal, and two aggregates. Use a key with a deterministic collation.';
        END IF;
        n := wanted.n;
        attnum := wanted.attnum;
        name := wanted.name;
        type := wanted.type;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Makes a generated function, which belongs to the owner of the captured table.
CREATE FUNCTION outbox.make_captured(signature text, rest text, source text, owner regrole, for_all boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    bare text := split_part(signature, '(', 1);
BEGIN
    EXECUTE format('CREATE OR REPLACE FUNCTION outbox_capture.%s LANGUAGE plpgsql VOLATILE SECURITY DEFINER '
                   'SET search_path = pg_catalog, pg_temp %s AS %L', signature, rest, source);
    EXECUTE format('%s EXECUTE ON FUNCTION outbox_capture.%s %s PUBLIC', CASE WHEN for_all THEN 'GRANT' ELSE 'REVOKE' END,
                   bare, CASE WHEN for_all THEN 'TO' ELSE 'FROM' END);
    IF (SELECT p.proowner FROM pg_proc p WHERE p.oid = ('outbox_capture.' || bare)::regproc) <> owner THEN
        EXECUTE format('ALTER FUNCTION outbox_capture.%s OWNER TO %s', bare, owner);
    END IF;
END
$$;

-- The query for the keys of a root: those after `after`, at most `most`, in the order of its columns.
CREATE FUNCTION outbox.captured_keys_query(captured outbox.captured_type, condition text) RETURNS text
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $outer$
    SELECT format('SELECT %1$s FROM %2$s AS o WHERE (%3$s) AND (%4$s) AND (after IS NULL OR (%5$s) > (%6$s)) ORDER BY %5$s LIMIT most',
                  CASE count(*) WHEN 1 THEN format('o.%I::text', min(c.name))
                       ELSE format('json_build_array(%s)::text', string_agg(format('o.%I', c.name), ', ' ORDER BY c.n)) END,
                  captured.root_name, condition, string_agg(format('o.%I IS NOT NULL', c.name), ' AND '),
                  string_agg(format('o.%I', c.name), ', ' ORDER BY c.n),
                  string_agg(format('%s::%s', CASE t.columns WHEN 1 THEN 'after' ELSE format('(after::json ->> %s)', c.n - 1) END,
                                    format_type(c.type, NULL)), ', ' ORDER BY c.n))
    FROM (SELECT k.n, a.attname AS name, outbox.base_type(a.atttypid) AS type
          FROM outbox.captured_table t
          CROSS JOIN unnest(t.key_columns) WITH ORDINALITY AS k (attnum, n)
          JOIN pg_attribute a ON a.attrelid = t.relation AND a.attnum = k.attnum
          WHERE t.capture = captured.capture AND t.relation = captured.root) AS c
    CROSS JOIN (SELECT cardinality(t.key_columns) AS columns FROM outbox.captured_table t
                WHERE t.capture = captured.capture AND t.relation = captured.root) AS t
$outer$;

-- Makes the functions of a captured type: what reads bodies, and what publishes them.
--   read_N      the bodies of keys, and whether their rows are there. Settings are pinned, so that a body does not depend on
--               the writer: neither what it looks like (times, intervals, bytes, numbers), nor what is in it (row
--               security: where it would hide a row of the owner, it is an error). Plans are pinned to the indexes of
--               keys: a plan that was made while tables were empty would stay.
--   append_N    publishes keys whose chains are locked. Bodies are handed over at most 1,000 and about 8 MB at a time.
--   publish_N   publishes what the transaction has touched.
--   state_N     publishes baselines; with `silently` it publishes nothing, and begins the chains that there are not.
--   keys_N      the keys of the root in their order, after one of them.
CREATE FUNCTION outbox.make_captured_type(captured outbox.captured_type, owner regrole) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $outer$
DECLARE
    of_capture constant integer := captured.capture;
    called   constant regprocedure := captured.body;
    columns  record;
    relayer  regrole;
    body     text;
BEGIN
    SELECT string_agg(format('o.%I = %s::%s', c.name, c.part, format_type(c.type, NULL)), ' AND ' ORDER BY c.n) AS found,
           string_agg(format('%s::%s', c.part, format_type(p.proargtypes[c.n - 1], NULL)), ', ' ORDER BY c.n) AS given
    INTO columns
    FROM (SELECT k.n, a.attname AS name, outbox.base_type(a.atttypid) AS type,
                 CASE cardinality(t.key_columns) WHEN 1 THEN 'k.key' ELSE format('(k.key::json ->> %s)', k.n - 1) END AS part
          FROM outbox.captured_table t
          CROSS JOIN unnest(t.key_columns) WITH ORDINALITY AS k (attnum, n)
          JOIN pg_attribute a ON a.attrelid = t.relation AND a.attnum = k.attnum
          WHERE t.capture = of_capture AND t.relation = captured.root) AS c
    LEFT JOIN pg_proc p ON p.oid = called;
    IF called IS NOT NULL THEN
        body := format('%s(%s)', called::oid::regproc, columns.given);
    ELSIF captured.left_out = '{}' THEN
        body := 'row_to_json(o)';
    ELSE
        body := '(SELECT concat(''{'', string_agg(concat(to_json(f.key), '':'', f.value), '','' ORDER BY f.n), ''}'') '
                'FROM json_each(row_to_json(o)) WITH ORDINALITY AS f (key, value, n) WHERE f.key <> ALL (left_out))';
    END IF;
    PERFORM outbox.make_captured(
        format('read_%s(keys text[]) RETURNS TABLE (key text, present boolean, body text)', of_capture),
        'SET row_security = off SET timezone = ''UTC'' SET datestyle = ''ISO, YMD'' SET intervalstyle = ''iso_8601'' '
        'SET bytea_output = ''hex'' SET extra_float_digits = 1 SET lc_monetary = ''C'' '
        'SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off '
        'SET plan_cache_mode = force_generic_plan',
        format($$
#variable_conflict use_column
DECLARE
    left_out constant text[] := ARRAY(SELECT a.attname::text FROM pg_attribute a
                                      WHERE a.attrelid = %1$L::regclass AND a.attnum = ANY (%2$L));
BEGIN
    RETURN QUERY
    SELECT k.key, r.present IS TRUE, r.body
    FROM unnest(keys) AS k (key)
    LEFT JOIN LATERAL (SELECT true AS present, %3$s::text AS body FROM %4$s AS o WHERE %5$s LIMIT 1) AS r ON true;
EXCEPTION WHEN undefined_table OR undefined_column OR undefined_function THEN
    RAISE EXCEPTION 'the captured aggregate type %% cannot be read: %%', %6$L, SQLERRM
        USING ERRCODE = SQLSTATE,
              HINT = 'A table, a column or a function that it needs was dropped or renamed. Correct the body function, or '
                     'call outbox.capture again for the table %4$s.';
END
$$, captured.root_name, captured.left_out, body, captured.root_name, columns.found, captured.aggregate_type),
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
    PERFORM outbox.make_captured(
        format('publish_%s() RETURNS void', of_capture), '',
        format($$
DECLARE
    taken record;
    one   record;
    page  text[];
BEGIN
    SELECT t.key, t.place, t.keys INTO taken FROM outbox.take_touched(%1$s) AS t;
    -- Read after the lock, by a later statement, which sees what was committed before.
    IF taken.key IS NOT NULL THEN
        SELECT r.present, r.body INTO one FROM outbox_capture.read_%1$s(ARRAY[taken.key]) AS r;
        PERFORM outbox.append_captured(%1$s, taken.key, taken.place, one.present, one.body);
    ELSIF taken.keys IS NOT NULL THEN
        LOOP
            page := outbox.next_touched(taken.keys);
            EXIT WHEN page IS NULL;
            PERFORM outbox_capture.append_%1$s(page, false);
        END LOOP;
    END IF;
END
$$, of_capture), owner, true);
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

-- Makes the trigger functions of a captured table, and the triggers: also on its partitions and children, because a statement
-- on one of them fires the triggers of that one alone. A statement on a single row has a short way: a plan for many costs
-- more than everything else.
CREATE FUNCTION outbox.make_captured_table(captured outbox.captured_table, is_root boolean, owner regrole) RETURNS void
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
        SELECT (SELECT count(*) FROM (SELECT FROM outbox_rows x LIMIT 2) AS c),
               (SELECT %1$s FROM outbox_old_rows x LIMIT 1), (SELECT %1$s FROM outbox_rows x LIMIT 1)
        INTO rows, before, after;%2$s
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

-- Captures a table: from the commit on, each transaction publishes what it changes.
--   of_table        the table. The first one that is captured for a type is its root, with one row for each aggregate; each
--                   further one has rows that belong to an aggregate, such as the lines of an order.
--   aggregate_type  the type of the aggregates, and the first word of their events' types: `order.new`, `order.changed`,
--                   `order.deleted`.
--   key             the column with the id of the aggregate; of several columns, their names with commas. The aggregate's id
--                   is then a JSON array.
--   body            of the root: the function that returns the body, called with the key. By default the body is the row.
--   left_out        of the root without a body function: columns that the row's body lacks, with commas.
-- Again for the same table, it brings the capture up to date. Runs with its caller's rights, who has to own the table.
-- Returns what it did, in words.
CREATE FUNCTION outbox.capture(of_table regclass, aggregate_type text, key text DEFAULT 'id', body text DEFAULT NULL,
                               left_out text DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    of_type  constant text := aggregate_type;
    relation record;
    captured outbox.captured_type;
    part     outbox.captured_table;
    root     outbox.captured_table;
    columns  record;
    others   record;
    called   pg_proc;
    missing  text;
    omitted  smallint[] := '{}';
    is_root  boolean;
    unique_  boolean;
    sample   text;
    found    record;
BEGIN
    IF of_table IS NULL THEN
        RAISE EXCEPTION 'the argument of_table of outbox.capture is null' USING ERRCODE = 'null_value_not_allowed';
    ELSIF of_type IS NULL OR octet_length(of_type) NOT BETWEEN 1 AND 246 THEN
        RAISE EXCEPTION 'the argument aggregate_type of outbox.capture has % bytes', coalesce(octet_length(of_type), 0)
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Give a name of 1 to 246 bytes. It begins the types of the events, which have at most 255.';
    END IF;
    SELECT c.oid, c.relkind, c.relpersistence, c.relowner::regrole AS owner, c.relispartition, n.nspname,
           format('%I.%I', CASE c.relpersistence WHEN 't' THEN 'pg_temp' ELSE n.nspname END, c.relname) AS name
    INTO relation FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = of_table;
    IF relation.oid IS NULL THEN
        RAISE EXCEPTION 'there is no table %', of_table USING ERRCODE = 'undefined_table';
    ELSIF relation.relkind NOT IN ('r', 'p') OR relation.relpersistence = 't' THEN
        RAISE EXCEPTION '% is not an ordinary table', relation.name
            USING ERRCODE = 'wrong_object_type',
                  HINT = 'Capture the tables that have the rows: views, foreign tables and temporary tables cannot be captured.';
    ELSIF relation.relispartition THEN
        RAISE EXCEPTION '% is a partition', relation.name
            USING ERRCODE = 'wrong_object_type',
                  HINT = format('Capture %s, with all its partitions.', pg_partition_root(of_table));
    ELSIF relation.nspname IN ('outbox', 'outbox_capture', 'pg_catalog', 'information_schema') THEN
        RAISE EXCEPTION 'tables of the schema % cannot be captured', relation.nspname USING ERRCODE = 'wrong_object_type';
    ELSIF NOT pg_has_role(relation.owner, 'MEMBER') THEN
        RAISE EXCEPTION 'only the owner of the table %, %, may capture it', relation.name, relation.owner
            USING ERRCODE = 'insufficient_privilege', HINT = format('SET ROLE %s, or ask its owner.', relation.owner);
    END IF;
    -- The owner's functions use a few things of the outbox.
    IF NOT (has_schema_privilege('public', 'outbox_capture', 'USAGE')
            AND has_schema_privilege(relation.owner::oid, 'outbox_capture', 'CREATE')
            AND has_schema_privilege(relation.owner::oid, 'outbox', 'USAGE')
            AND has_column_privilege(relation.owner::oid, 'outbox.touched', 'keys', 'INSERT')
            AND has_function_privilege(relation.owner::oid, 'outbox.take_touched(integer)', 'EXECUTE')) THEN
        IF NOT pg_has_role((SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'outbox'), 'MEMBER') THEN
            RAISE EXCEPTION 'the role % may not capture tables', relation.owner
                USING ERRCODE = 'insufficient_privilege',
                      HINT = format('The owner of the schema outbox allows it: SELECT outbox.grant_capture(%L).', relation.owner);
        END IF;
        PERFORM outbox.grant_capture(relation.owner);
    END IF;
    PERFORM outbox.claim_type(of_type);
    -- One capture at a time.
    PERFORM pg_advisory_xact_lock(1869968482, 5);
    SELECT array_agg(k.attnum ORDER BY k.n) AS numbers, array_agg(k.name ORDER BY k.n) AS names,
           array_agg(k.type ORDER BY k.n) AS types
    INTO columns FROM outbox.key_columns(of_table, key) k;
    IF cardinality(columns.numbers) > 32 THEN
        RAISE EXCEPTION 'the key of % has % columns', relation.name, cardinality(columns.numbers)
            USING ERRCODE = 'too_many_columns', HINT = 'At most 32 are possible.';
    END IF;
    SELECT * INTO captured FROM outbox.captured_type c WHERE c.aggregate_type = of_type;
    IF captured.capture IS NOT NULL AND captured.root <> of_table AND to_regclass(captured.root_name) IS DISTINCT FROM captured.root THEN
        RAISE EXCEPTION 'the table % of the captured aggregate type % was dropped, renamed or replaced by another',
                        captured.root_name, of_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('SELECT outbox.uncapture_type(%L), and then capture each table of the aggregate.', of_type);
    END IF;
    is_root := captured.capture IS NULL OR captured.root = of_table;
    -- Parts that were dropped are parts no more.
    PERFORM outbox.drop_captured_table(t.number) FROM outbox.captured_table t
    WHERE t.capture = captured.capture AND t.relation <> captured.root
      AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.relation);
    IF is_root THEN
        -- One row for each key.
        unique_ := EXISTS (
            SELECT FROM pg_index i
            WHERE i.indrelid = of_table AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
              AND (i.indkey::smallint[])[0:i.indnkeyatts - 1] <@ columns.numbers);
        IF body IS NOT NULL AND left_out IS NOT NULL THEN
            RAISE EXCEPTION 'the arguments body and left_out of outbox.capture are both given'
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'left_out is about the row as the body. A body function leaves out what it does not return.';
        ELSIF body IS NULL AND NOT unique_ THEN
            RAISE EXCEPTION 'the key % of % is not unique, so the body cannot be its row', key, relation.name
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'Name the columns of the primary key or of a unique index, or give a body function.';
        ELSIF NOT unique_ AND NOT EXISTS (
            SELECT FROM pg_index i WHERE i.indrelid = of_table AND i.indisvalid AND i.indpred IS NULL
              AND i.indkey[0] = ANY (columns.numbers)) THEN
            RAISE EXCEPTION 'the key % of % has no index', key, relation.name
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'Each event would read the whole table. Create an index that begins with the key.';
        END IF;
        IF left_out IS NOT NULL THEN
            SELECT string_agg(trim(c.name), ', ') FILTER (WHERE a.attnum IS NULL), array_agg(a.attnum ORDER BY a.attnum)
            INTO missing, omitted
            FROM string_to_table(left_out, ',') AS c (name)
            LEFT JOIN pg_attribute a
              ON a.attrelid = of_table AND a.attname = trim(c.name) AND a.attnum > 0 AND NOT a.attisdropped;
            IF missing IS NOT NULL THEN
                RAISE EXCEPTION 'the table % has no column %, which is named in left_out', relation.name, missing
                    USING ERRCODE = 'undefined_column', HINT = 'Name columns as they are stored: without quotes, in their case.';
            END IF;
        END IF;
        IF body IS NOT NULL THEN
            SELECT p.* INTO called FROM pg_proc p
            WHERE p.oid = CASE WHEN strpos(body, '(') > 0 THEN to_regprocedure(body)::oid ELSE to_regproc(body)::oid END;
            IF called.oid IS NULL THEN
                RAISE EXCEPTION 'the argument body of outbox.capture names no function, or several: %', body
                    USING ERRCODE = 'undefined_function',
                          HINT = 'Give the name of a function with its schema, as ''shop.order_body''; of several with one '
                                 'name also the types of its arguments, as ''shop.order_body(bigint)''.';
            ELSIF called.prokind <> 'f' OR called.proretset OR called.provariadic <> 0
                  OR called.pronargs <> cardinality(columns.numbers)
                  OR called.prorettype NOT IN ('json'::regtype, 'jsonb'::regtype) THEN
                RAISE EXCEPTION 'the body function % does not take % and return one json or jsonb', called.oid::regprocedure,
                                CASE cardinality(columns.numbers) WHEN 1 THEN 'one argument'
                                ELSE format('%s arguments', cardinality(columns.numbers)) END
                    USING ERRCODE = 'invalid_function_definition',
                          HINT = 'It takes the key of an aggregate, and returns its body.';
            ELSIF called.prosqlbody IS NULL
                  AND NOT EXISTS (SELECT FROM unnest(called.proconfig) AS s (setting) WHERE s.setting LIKE 'search_path=%') THEN
                RAISE EXCEPTION 'the body function % has no fixed search_path', called.oid::regprocedure
                    USING ERRCODE = 'invalid_function_definition',
                          HINT = format('It would read other tables for other writers. Give it a body with BEGIN ATOMIC, or: '
                                        'ALTER FUNCTION %s SET search_path = %I, pg_temp', called.oid::regprocedure,
                                        relation.nspname);
            ELSIF NOT has_function_privilege(relation.owner::oid, called.oid, 'EXECUTE') THEN
                RAISE EXCEPTION 'the role %, which owns %, may not call the body function %', relation.owner, relation.name,
                                called.oid::regprocedure
                    USING ERRCODE = 'insufficient_privilege', HINT = format('GRANT EXECUTE ON FUNCTION %s TO %s',
                                                                            called.oid::regprocedure, relation.owner);
            END IF;
        END IF;
        IF captured.capture IS NULL THEN
            INSERT INTO outbox.captured_type AS c (aggregate_type, root, root_name, body, left_out)
            VALUES (of_type, of_table, relation.name, called.oid::regprocedure::text, omitted) RETURNING c.* INTO captured;
        ELSE
            UPDATE outbox.captured_type c
            SET root_name = relation.name, body = called.oid::regprocedure::text, left_out = omitted
            WHERE c.capture = captured.capture RETURNING c.* INTO captured;
        END IF;
        SELECT t.name, t.key_names INTO others FROM outbox.captured_table t
        WHERE t.capture = captured.capture AND t.relation <> of_table
          AND (SELECT array_agg(CASE WHEN k.type IN ('text', 'varchar') THEN 'text'::regtype
                                     WHEN k.type IN ('smallint', 'integer') THEN 'bigint'::regtype ELSE k.type END ORDER BY k.n)
               FROM unnest(columns.types) WITH ORDINALITY AS k (type, n))
              IS DISTINCT FROM
              (SELECT array_agg(CASE WHEN k.type IN ('text', 'varchar') THEN 'text'::regtype
                                     WHEN k.type IN ('smallint', 'integer') THEN 'bigint'::regtype ELSE k.type END ORDER BY k.n)
               FROM (SELECT n.n, outbox.base_type(a.atttypid) AS type
                     FROM unnest(t.key_columns) WITH ORDINALITY AS n (attnum, n)
                     JOIN pg_attribute a ON a.attrelid = t.relation AND a.attnum = n.attnum) AS k)
        LIMIT 1;
        IF others.name IS NOT NULL THEN
            RAISE EXCEPTION 'the key % of % has other types than the key % of %', key, relation.name,
                            array_to_string(others.key_names, ', '), others.name
                USING ERRCODE = 'datatype_mismatch',
                      HINT = format('The tables of an aggregate have keys of the same types. SELECT outbox.uncapture_type(%L) '
                                    'to begin again.', of_type);
        END IF;
    ELSE
        IF body IS NOT NULL OR left_out IS NOT NULL THEN
            RAISE EXCEPTION 'the body of the type % is that of %, so % can have none', of_type, captured.root_name, relation.name
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = format('Leave out body and left_out here. Give them with the first table of the type, %s. If %s '
                                    'was meant to be the first one: SELECT outbox.uncapture_type(%L).', captured.root_name,
                                    relation.name, of_type);
        END IF;
        SELECT t.* INTO root FROM outbox.captured_table t WHERE t.capture = captured.capture AND t.relation = captured.root;
        SELECT array_agg(outbox.base_type(a.atttypid) ORDER BY k.n) AS types, c.relowner::regrole AS owner INTO others
        FROM unnest(root.key_columns) WITH ORDINALITY AS k (attnum, n)
        JOIN pg_attribute a ON a.attrelid = root.relation AND a.attnum = k.attnum
        JOIN pg_class c ON c.oid = root.relation
        GROUP BY c.relowner;
        IF others.owner IS DISTINCT FROM relation.owner THEN
            RAISE EXCEPTION 'the table % belongs to %, and % of the same aggregate type belongs to %', relation.name,
                            relation.owner, root.name, others.owner
                USING ERRCODE = 'insufficient_privilege',
                      HINT = format('The tables of an aggregate have one owner: ALTER TABLE %s OWNER TO %s', relation.name,
                                    others.owner);
        ELSIF (SELECT bool_and(coalesce(c.type = o.type
                               OR c.type IN ('text', 'varchar') AND o.type IN ('text', 'varchar')
                               OR c.type IN ('smallint', 'integer', 'bigint') AND o.type IN ('smallint', 'integer', 'bigint')
                                  AND (SELECT t.typlen FROM pg_type t WHERE t.oid = c.type)
                                      <= (SELECT t.typlen FROM pg_type t WHERE t.oid = o.type), false))
               FROM unnest(columns.types) WITH ORDINALITY AS c (type, n)
               FULL JOIN unnest(others.types) WITH ORDINALITY AS o (type, n) USING (n)) IS NOT TRUE THEN
            RAISE EXCEPTION 'the key % of % has the type %, and the key % of % has %', key, relation.name,
                            array_to_string(columns.types, ', '), array_to_string(root.key_names, ', '), root.name,
                            array_to_string(others.types, ', ')
                USING ERRCODE = 'datatype_mismatch',
                      HINT = 'It names the aggregate to which a row belongs, so it has the same columns and types.';
        END IF;
    END IF;
    INSERT INTO outbox.captured_table AS t (capture, relation, name, key_columns, key_names)
    VALUES (captured.capture, of_table, relation.name, columns.numbers, columns.names)
    ON CONFLICT ON CONSTRAINT captured_table_pkey DO UPDATE
    SET name = excluded.name, key_columns = excluded.key_columns, key_names = excluded.key_names
    RETURNING t.* INTO part;
    IF is_root THEN
        PERFORM outbox.make_captured_type(captured, relation.owner);
    END IF;
    PERFORM outbox.make_captured_table(part, is_root, relation.owner);
    -- Once, to see that it works: what fails here would fail in every writer.
    IF is_root THEN
        EXECUTE format('SELECT %s FROM %s AS x LIMIT 1',
                       CASE cardinality(columns.names) WHEN 1 THEN format('x.%I::text', columns.names[1])
                       ELSE format('json_build_array(%s)::text', (SELECT string_agg(format('x.%I', c.name), ', ' ORDER BY c.n)
                                   FROM unnest(columns.names) WITH ORDINALITY AS c (name, n))) END, of_table) INTO sample;
        IF sample IS NOT NULL THEN
            EXECUTE format('SELECT r.present, r.body FROM outbox_capture.read_%s(ARRAY[$1]) AS r', captured.capture)
                INTO found USING sample;
            PERFORM outbox.refuse_captured(of_type, sample, found.present, found.body);
        ELSIF called.oid IS NOT NULL THEN
            -- There is no row: with a key that there may be, and with the owner's rights.
            PERFORM outbox.make_captured(format('try_%s() RETURNS void', captured.capture), 'SET row_security = off', format(
                'BEGIN PERFORM %s(%s); END', called.oid::regproc,
                (SELECT string_agg(format('%L::%s', CASE c.type WHEN 'uuid'::regtype
                                                    THEN '00000000-0000-0000-0000-000000000000' ELSE '0' END,
                                          format_type(called.proargtypes[c.n - 1], NULL)), ', ' ORDER BY c.n)
                 FROM unnest(columns.types) WITH ORDINALITY AS c (type, n))), relation.owner, false);
            EXECUTE format('SELECT outbox_capture.try_%s()', captured.capture);
            EXECUTE format('DROP FUNCTION outbox_capture.try_%s()', captured.capture);
        END IF;
    END IF;
    RETURN format('%s is captured as %s of the aggregate type %s', relation.name,
                  CASE WHEN is_root THEN 'the root' ELSE 'a part' END, of_type);
END
$$;

-- Ends the capture of a type: nothing more is published of it. What was published stays, and so do the chains, so that a new
-- capture goes on with the versions.
CREATE FUNCTION outbox.uncapture_type(aggregate_type text) RETURNS void
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
    FOR part IN SELECT p.oid::regprocedure AS called FROM pg_proc p
                WHERE p.pronamespace = 'outbox_capture'::regnamespace
                  AND p.proname ~ format('^(read|append|publish|state|keys)_%s$', captured.capture)
    LOOP
        EXECUTE format('DROP FUNCTION %s', part.called);
    END LOOP;
    DELETE FROM outbox.captured_type c WHERE c.capture = captured.capture;
END
$$;

-- Removes the triggers of a captured table, wherever they are, with their functions.
CREATE FUNCTION outbox.drop_captured_table(of_number integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part record;
BEGIN
    FOR part IN SELECT g.tgname, g.tgrelid::regclass AS relation FROM pg_trigger g
                JOIN pg_proc p ON p.oid = g.tgfoid AND p.pronamespace = 'outbox_capture'::regnamespace
                WHERE p.proname ~ format('^touch_%s_', of_number) ORDER BY g.tgrelid
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', part.tgname, part.relation);
    END LOOP;
    FOR part IN SELECT p.oid::regprocedure AS called FROM pg_proc p
                WHERE p.pronamespace = 'outbox_capture'::regnamespace AND p.proname ~ format('^touch_%s_', of_number)
    LOOP
        EXECUTE format('DROP FUNCTION %s', part.called);
    END LOOP;
    DELETE FROM outbox.captured_table t WHERE t.number = of_number;
END
$$;

-- Ends the capture of a table: of the root, that of the whole type.
CREATE FUNCTION outbox.uncapture(of_table regclass, aggregate_type text DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    of_type constant text := aggregate_type;
    part    record;
    ended   boolean := false;
BEGIN
    PERFORM pg_advisory_xact_lock(1869968482, 5);
    FOR part IN
        SELECT t.number, c.aggregate_type, c.root = of_table AS is_root
        FROM outbox.captured_table t JOIN outbox.captured_type c ON c.capture = t.capture
        WHERE t.relation = of_table AND (of_type IS NULL OR c.aggregate_type = of_type)
    LOOP
        ended := true;
        IF part.is_root THEN
            PERFORM outbox.uncapture_type(part.aggregate_type);
        ELSE
            PERFORM outbox.drop_captured_table(part.number);
        END IF;
    END LOOP;
    IF NOT ended THEN
        RAISE EXCEPTION 'the table % is not captured%', of_table, coalesce(' for the type ' || of_type, '')
            USING ERRCODE = 'undefined_object',
                  HINT = 'SELECT * FROM outbox.captured says what is. A table that was dropped or renamed: '
                         'SELECT outbox.uncapture_type(its aggregate type).';
    END IF;
END
$$;

-- Publishes the state of one captured aggregate, under its chain's lock: a baseline, or its deletion if it is gone and
-- subscribers were not told. Returns its version; null if there is nothing to tell.
CREATE FUNCTION outbox.publish_state(aggregate_type text, aggregate_id text) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    of_type constant text := aggregate_type;
    of_id   constant text := aggregate_id;
BEGIN
    IF of_id IS NULL THEN
        RAISE EXCEPTION 'the argument aggregate_id of outbox.publish_state is null' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF outbox.publish_states(of_type, ARRAY[of_id]) = 0 THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT a.version FROM outbox.aggregate a WHERE a.aggregate_type = of_type AND a.aggregate_id = of_id);
END
$$;

-- The number of a captured type, whose functions are as outbox.capture made them: they run with the rights of the table's
-- owner. Changed ones would have those of who calls them here.
CREATE FUNCTION outbox.capture_of(of_type text) RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    captured outbox.captured_type;
    changed  text;
BEGIN
    SELECT * INTO captured FROM outbox.captured_type c WHERE c.aggregate_type = of_type;
    IF captured.capture IS NULL THEN
        RAISE EXCEPTION 'the type % is not captured', of_type
            USING ERRCODE = 'undefined_object', HINT = 'SELECT * FROM outbox.captured says what is.';
    END IF;
    SELECT string_agg(f.name, ', ') INTO changed
    FROM unnest(ARRAY['read', 'state', 'append', 'publish', 'keys']) AS w (word)
    CROSS JOIN LATERAL (SELECT format('%s_%s', w.word, captured.capture) AS name) AS f
    LEFT JOIN pg_proc p ON p.proname = f.name AND p.pronamespace = 'outbox_capture'::regnamespace
    WHERE (p.prosecdef AND p.proowner = (SELECT c.relowner FROM pg_class c WHERE c.oid = captured.root)) IS NOT TRUE;
    IF changed IS NOT NULL THEN
        RAISE EXCEPTION 'the functions % of the captured type % are not as outbox.capture made them', changed, of_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Call outbox.capture for %s again.', captured.root_name);
    END IF;
    RETURN captured.capture;
END
$$;

-- The same of many aggregates. Returns how many events that were.
CREATE FUNCTION outbox.publish_states(aggregate_type text, aggregate_ids text[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    published bigint;
BEGIN
    EXECUTE format('SELECT outbox_capture.state_%s($1, false)', outbox.capture_of(aggregate_type)) INTO published
        USING ARRAY(SELECT DISTINCT k.id FROM unnest(aggregate_ids) AS k (id) ORDER BY k.id);
    RETURN published;
END
$$;

-- What differs between the chains and the tables, of some aggregates: those whose body is not that of their last event
-- (`changed`), that were never published (`new`), or whose row is gone and whose deletion was not published (`deleted`).
-- Where a writer is under way it may differ for a moment. Nothing is locked.
CREATE FUNCTION outbox.captured_difference(aggregate_type text, aggregate_ids text[])
    RETURNS TABLE (aggregate_id text, differs text)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    of_type constant text := aggregate_type;
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT r.key, d.differs FROM outbox_capture.read_%s($2) AS r
         LEFT JOIN outbox.aggregate a ON a.aggregate_type = $1 AND a.aggregate_id = r.key
         CROSS JOIN LATERAL (SELECT CASE
             WHEN r.present AND (a.version IS NULL OR a.version = 0 OR a.state <> ''live'') THEN ''new''
             WHEN r.present AND sha256(convert_to(r.body, ''UTF8'')) IS DISTINCT FROM a.body_hash THEN ''changed''
             WHEN NOT r.present AND a.state <> ''ended'' THEN ''deleted'' END AS differs) AS d
         WHERE d.differs IS NOT NULL', outbox.capture_of(of_type)) USING of_type, aggregate_ids;
END
$$;
-- What the owner of captured tables needs and no more. It may then capture its own tables, and publish events of types that
-- it captures. Run it as the owner of the schema outbox.
CREATE FUNCTION outbox.grant_capture(role regrole) RETURNS void
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
                   ' outbox.append_captured(integer, text[], boolean[], text[], boolean) TO %s', role);
END
$$;

-- The keys of a captured root in their order: at most `most` of them, after `after`, of rows that fulfil a condition (`o` is
-- the row). A condition is read with the rights of the caller, who then has to have SELECT on the table.
CREATE FUNCTION outbox.captured_keys(aggregate_type text, condition text, after text, most bigint) RETURNS SETOF text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    of_type  constant text := aggregate_type;
    capture  constant integer := outbox.capture_of(of_type);
    captured outbox.captured_type;
BEGIN
    IF condition IS NULL THEN
        RETURN QUERY EXECUTE format('SELECT k FROM outbox_capture.keys_%s($1, $2) AS k', capture) USING after, most;
        RETURN;
    END IF;
    SELECT * INTO captured FROM outbox.captured_type c WHERE c.aggregate_type = of_type;
    RETURN QUERY EXECUTE format('SELECT k.* FROM (SELECT $1 AS after, $2 AS most) AS a, LATERAL (%s) AS k',
                                replace(outbox.captured_keys_query(captured, condition), 'LIMIT most', 'LIMIT $2'))
        USING after, most;
END
$$;

-- The states of captured aggregates, each with its version and the id of the event that has it, for who tells them to one
-- subscriber alone. First the chains begin that there are not: call it in a transaction of its own each. The second one, in
-- REPEATABLE READ, sees bodies and versions that belong together, and locks nothing.
CREATE FUNCTION outbox.begin_states(aggregate_type text, aggregate_ids text[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    begun bigint;
BEGIN
    EXECUTE format('SELECT outbox_capture.state_%s($1, true)', outbox.capture_of(aggregate_type)) INTO begun USING aggregate_ids;
    RETURN begun;
END
$$;
CREATE FUNCTION outbox.captured_states(aggregate_type text, aggregate_ids text[])
    RETURNS TABLE (aggregate_id text, version bigint, event_id uuid, body text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    of_type constant text := aggregate_type;
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        RAISE EXCEPTION 'outbox.captured_states has to read bodies and versions of one moment: use REPEATABLE READ'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    RETURN QUERY EXECUTE format(
        'SELECT r.key, a.version, a.last_event_id, r.body FROM outbox_capture.read_%s($2) AS r
         JOIN outbox.aggregate a ON a.aggregate_type = $1 AND a.aggregate_id = r.key
         WHERE r.present AND a.version > 0 AND a.state <> ''ended'' AND r.body IS NOT NULL', outbox.capture_of(of_type))
        USING of_type, aggregate_ids;
END
$$;
REVOKE EXECUTE ON FUNCTION
    outbox.captured_keys_query(outbox.captured_type, text), outbox.captured_keys(text, text, text, bigint),
    outbox.begin_states(text, text[]), outbox.captured_states(text, text[]),
    outbox.base_type(oid), outbox.key_columns(regclass, text), outbox.make_captured(text, text, text, regrole, boolean),
    outbox.make_captured_type(outbox.captured_type, regrole),
    outbox.make_captured_table(outbox.captured_table, boolean, regrole),
    outbox.capture(regclass, text, text, text, text), outbox.uncapture_type(text), outbox.drop_captured_table(integer),
    outbox.uncapture(regclass, text), outbox.publish_state(text, text), outbox.publish_states(text, text[]),
    outbox.capture_of(text), outbox.captured_difference(text, text[]), outbox.grant_capture(regrole)
FROM PUBLIC;

-- What is captured.
CREATE VIEW outbox.captured AS
SELECT c.aggregate_type, t.name AS table_name, t.relation = c.root AS is_root, array_to_string(t.key_names, ', ') AS key,
       CASE WHEN t.relation = c.root THEN c.body END AS body,
       CASE WHEN t.relation = c.root THEN (
           SELECT string_agg(a.attname, ', ' ORDER BY a.attnum) FROM pg_attribute a
           WHERE a.attrelid = c.root AND a.attnum = ANY (c.left_out) AND NOT a.attisdropped) END AS left_out,
       t.relation, c.capture, t.number
FROM outbox.captured_table t JOIN outbox.captured_type c ON c.capture = t.capture;
COMMENT ON VIEW outbox.captured IS
    'A row: a table whose changes are published as events of aggregate_type.
is_root: it has one row for each aggregate. key: its columns with the id of the aggregate. body: the function that returns
the body of an event; null: the row. left_out: columns that the row''s body lacks.';

-- Why a capture misses changes, or makes its writers fail. Found in the catalog alone: no captured table is read.
CREATE VIEW outbox.capture_problem AS
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
    SELECT p.*, format('outbox_capture_%s_%s', p.number, w.action) AS name, g.tgenabled
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
COMMENT ON VIEW outbox.capture_problem IS
    'A row: why a captured table misses changes, or makes its writers fail, and what to do.';

COMMENT ON TABLE outbox.captured_type IS 'A row: a captured aggregate type. outbox.captured shows it.';
COMMENT ON TABLE outbox.captured_table IS 'A row: a captured table. outbox.captured shows it.';
COMMENT ON TABLE outbox.touched IS
    'What the transactions under way have touched of captured tables. Empty but for these.';
COMMENT ON FUNCTION outbox.capture(regclass, text, text, text, text) IS
    'Publishes the changes of a table as events of aggregate_type. The first table of a type is its root, with one row for each
aggregate; of further ones, key names the aggregate. Call it again after changes of the schema.';
COMMENT ON FUNCTION outbox.uncapture(regclass, text) IS
    'Ends the capture of a table; of the root, that of the whole type.';
COMMENT ON FUNCTION outbox.uncapture_type(text) IS 'Ends the capture of an aggregate type.';
COMMENT ON FUNCTION outbox.publish_state(text, text) IS
    'Publishes a baseline of a captured aggregate, or its deletion if it is gone, and returns the version.';
COMMENT ON FUNCTION outbox.captured_difference(text, text[]) IS
    'Which of these aggregates differ from their last event: new, changed or deleted. Locks nothing.';
COMMENT ON FUNCTION outbox.grant_capture(regrole) IS
    'Allows a role to capture the tables that it owns.';

-- As before. Of what is erased no hash of a body stays, so the next change of a captured aggregate is published in any case.
CREATE OR REPLACE FUNCTION outbox.erase(types text[], ids text[], below bigint[]) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ended   record;
    step    record;
    last    bigint;
    mark    bigint;
    done    bigint;
    left_of bigint := 2000;
    aside   boolean;
    erased  bigint := 0;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1869968482, 3);
    PERFORM FROM outbox.erasure r JOIN unnest(types, ids) AS e (type, id) ON (e.type, e.id) = (r.aggregate_type, r.aggregate_id)
    ORDER BY r.id FOR UPDATE OF r;
    SELECT p.last_value INTO mark FROM outbox.position p;
    FOR ended IN
        SELECT e.type, e.id, e.version FROM unnest(types, ids, below) AS e (type, id, version) ORDER BY 1, 2
    LOOP
        last := 0;
        done := 0;
        UPDATE outbox.aggregate a SET body_hash = NULL
        WHERE a.aggregate_type = ended.type AND a.aggregate_id = ended.id AND a.body_hash IS NOT NULL;
        LOOP
            EXIT WHEN left_of <= 0;
            SELECT * INTO step FROM outbox.erase_events(ended.type, ended.id, last, ended.version, mark, left_of);
            EXIT WHEN step.last_version IS NULL;
            left_of := left_of - greatest(step.erased, 1);
            last := step.last_version;
            done := done + step.erased;
        END LOOP;
        aside := outbox.erase_parked(ended.type, ended.id, ended.version, mark, greatest(left_of, 100));
        erased := erased + done;
        IF aside OR EXISTS (SELECT FROM outbox.event e
                            WHERE e.aggregate_type = ended.type AND e.aggregate_id = ended.id
                              AND e.version > last AND e.version < ended.version) THEN
            INSERT INTO outbox.erasure AS r (aggregate_type, aggregate_id, below, up_to, done_version, erased)
            VALUES (ended.type, ended.id, ended.version, mark, last, done)
            ON CONFLICT (aggregate_type, aggregate_id) DO UPDATE
            SET below = greatest(r.below, excluded.below), up_to = greatest(r.up_to, excluded.up_to),
                done_version = least(r.done_version, excluded.done_version), erased = r.erased + excluded.erased;
        END IF;
    END LOOP;
    RETURN erased;
END
$$;

-- What an operator's role needs to look, as before, and the captures.
CREATE OR REPLACE FUNCTION outbox.grant_reader(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.position, outbox.erasure, outbox.partition,'
                   ' outbox.overview, outbox.relay_status, outbox.leader_session, outbox.lock_holder,'
                   ' outbox.event_progress, outbox.parked_event, outbox.parked_group, outbox.waiting_group,'
                   ' outbox.partition_status, outbox.aggregate, outbox.aggregate_type, outbox.captured,'
                   ' outbox.capture_problem TO %s', role);
    EXECUTE format('GRANT SELECT (position, id, aggregate_type, aggregate_id, version, type, created_at, previous_id)'
                   ' ON outbox.event TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.leader_pid, outbox.retention_blocker TO %s', role);
END
$$;
SELECT outbox.grant_reader(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.relay_status'::regclass AND r.privilege_type = 'SELECT' AND r.grantee <> c.relowner AND r.grantee <> 0;

-- What a relay's role needs, as before, and to publish the states of captured aggregates and to compare them. Tables that
-- are captured later give it the same.
CREATE OR REPLACE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    captured record;
BEGIN
    PERFORM outbox.grant_reader(role);
    EXECUTE format('GRANT SELECT ON outbox.event, outbox.event_default TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON outbox.relay TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.parked, outbox.replay TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.add_partition, outbox.why_kept,'
                   ' outbox.retire_partition, outbox.drop_partition TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.readable, outbox.readable_parked, outbox.captured_type,'
                   ' outbox.captured_table TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.erase_step, outbox.try_lead, outbox.keep_erasures_out,'
                   ' outbox.keep_no_samples, outbox.capture_of, outbox.captured_difference, outbox.publish_state,'
                   ' outbox.publish_states, outbox.captured_keys, outbox.captured_keys_query, outbox.base_type,'
                   ' outbox.begin_states, outbox.captured_states TO %s', role);
    FOR captured IN SELECT c.capture FROM outbox.captured_type c LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION outbox_capture.read_%1$s, outbox_capture.state_%1$s, '
                       'outbox_capture.keys_%1$s TO %2$s', captured.capture, role);
    END LOOP;
END
$$;
SELECT outbox.grant_relay(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.parked'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;

-- The outbox owns the chains: it knows the last event of each aggregate, and an event that does not continue it is its
-- writer's error. Until now a writer could skip a version, take one twice or begin again at 1, and nobody told them:
-- subscribers waited for ever, or took the event for a duplicate.

-- The end of each aggregate's chain, one row each, for ever: retention does not touch it.
--   version            that of the last event.
--   last_event_id      its id. The zero UUID stands for an event that nobody knows.
--   previous_event_id  the id of the one before it. An UPDATE can return no old value, so it keeps one here.
--   last_position      its position. The next one lies above it.
--   state              live; ended, by `<type>.deleted`; or unknown.
--   body_hash          of the last body, where the outbox writes the events itself.
-- An ended chain stays: a key that is used again goes on with the next version.
-- The order is that of the bytes, which is the same on every system. Pages keep room, so that updates stay in them (HOT).
CREATE TABLE outbox.aggregate (
    aggregate_type    text   COLLATE "C" NOT NULL,
    aggregate_id      text   COLLATE "C" NOT NULL,
    version           bigint NOT NULL,
    last_event_id     uuid   NOT NULL,
    previous_event_id uuid   NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    last_position     bigint NOT NULL,
    state             text   NOT NULL DEFAULT 'unknown' CHECK (state IN ('live', 'ended', 'unknown')),
    body_hash         bytea,
    PRIMARY KEY (aggregate_type, aggregate_id)
) WITH (fillfactor = 70);
-- The server keeps no samples of what tells something of a body.
ALTER TABLE outbox.aggregate ALTER COLUMN body_hash SET STATISTICS 0;

-- Which side counts the versions of an aggregate type: the writer, which puts them into its INSERT, or the outbox. The first
-- event of a type decides, and the outbox refuses the other way: a writer that counts by itself would not know of the
-- versions that the outbox took meanwhile.
CREATE TABLE outbox.aggregate_type (
    aggregate_type text COLLATE "C" PRIMARY KEY,
    numbered_by    text NOT NULL CHECK (numbered_by IN ('outbox', 'writer'))
);

-- What is stored already, in two passes, so that writers wait for the second alone. The first one reads what was committed
-- when nobody wrote for a moment: the lock of outbox.next_position() is taken for that moment, against the writers, and
-- given back. It goes from the newest partition to the oldest: the first row of an aggregate is its last one.
SET LOCAL lock_timeout = '2s';
DO $$
DECLARE
    up_to bigint;
    part  record;
BEGIN
    PERFORM pg_advisory_lock(1869968482, 1);
    SELECT last_value INTO up_to FROM outbox.position;
    PERFORM pg_advisory_unlock(1869968482, 1);
    FOR part IN SELECT p.name FROM outbox.partition p ORDER BY p.is_default DESC, p.lower DESC NULLS LAST LOOP
        EXECUTE format(
            'INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
             SELECT DISTINCT ON (e.aggregate_type, e.aggregate_id) e.aggregate_type, e.aggregate_id, e.version, e.id,
                    e.position, CASE e.type WHEN e.aggregate_type || ''.deleted'' THEN ''ended'' ELSE ''live'' END
             FROM outbox.%I e WHERE e.position <= $1
             ORDER BY e.aggregate_type, e.aggregate_id, e.version DESC
             ON CONFLICT DO NOTHING', part.name) USING up_to;
    END LOOP;
    -- From here on nobody writes. What was committed meanwhile is little.
    ALTER TABLE outbox.event ADD COLUMN previous_id uuid;
    ALTER TABLE outbox.parked ADD COLUMN previous_id uuid;
    INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
    SELECT DISTINCT ON (e.aggregate_type, e.aggregate_id) e.aggregate_type, e.aggregate_id, e.version, e.id,
           e.position, CASE e.type WHEN e.aggregate_type || '.deleted' THEN 'ended' ELSE 'live' END
    FROM outbox.event e WHERE e.position > up_to
    ORDER BY e.aggregate_type, e.aggregate_id, e.version DESC
    ON CONFLICT ON CONSTRAINT aggregate_pkey DO UPDATE
    SET version = excluded.version, last_event_id = excluded.last_event_id, last_position = excluded.last_position,
        state = excluded.state;
END
$$;
-- Each type once: the next one after each, by the primary key.
INSERT INTO outbox.aggregate_type (aggregate_type, numbered_by)
WITH RECURSIVE t (aggregate_type) AS (
    SELECT min(a.aggregate_type) FROM outbox.aggregate a
    UNION ALL
    SELECT (SELECT min(a.aggregate_type) FROM outbox.aggregate a WHERE a.aggregate_type > t.aggregate_type)
    FROM t WHERE t.aggregate_type IS NOT NULL)
SELECT t.aggregate_type, 'writer' FROM t WHERE t.aggregate_type IS NOT NULL;

-- Whether history had been retired when the chains began. Then an aggregate without a row may have had events, and the
-- first one that comes is believed, whatever its version.
ALTER TABLE outbox.source ADD COLUMN adopts_chains boolean NOT NULL DEFAULT false;
UPDATE outbox.source SET adopts_chains = outbox.is_retired();

-- Records which side counts the versions of a type that has no event yet. Concurrent first events of types do not wait for
-- each other: one transaction records at a time, and the others leave it to the next event.
CREATE FUNCTION outbox.note_type(of_type text, counter text) RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_try_advisory_xact_lock(1869968482, 4) THEN
        INSERT INTO outbox.aggregate_type (aggregate_type, numbered_by) VALUES (of_type, counter) ON CONFLICT DO NOTHING;
    END IF;
EXCEPTION WHEN serialization_failure THEN
    -- A transaction that this one does not see has recorded it.
    NULL;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.note_type(text, text) FROM PUBLIC;

-- An event that does not continue its chain: why, or, where the chain may be taken up, the id of its predecessor. Off the
-- way of the events that do.
CREATE FUNCTION outbox.take_up_chain(of_type text, of_id text, came bigint, event_id uuid, at_position bigint, becomes text)
    RETURNS uuid
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    zero  constant uuid := '00000000-0000-0000-0000-000000000000';
    chain outbox.aggregate;
    name  text := of_type || '/' || of_id;
BEGIN
    SELECT * INTO chain FROM outbox.aggregate a
    WHERE a.aggregate_type = of_type AND a.aggregate_id = of_id;
    IF chain IS NULL THEN
        IF (SELECT s.adopts_chains FROM outbox.source s) THEN
            INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
            VALUES (of_type, of_id, came, event_id, at_position, becomes)
            ON CONFLICT DO NOTHING;
            IF FOUND THEN
                RETURN zero;
            END IF;
        END IF;
        IF came > 1 THEN
            RAISE EXCEPTION 'the first event of % has version %, and not 1', name, came
                USING ERRCODE = 'integrity_constraint_violation',
                      HINT = 'Versions count the events of an aggregate without holes: 1, 2, 3. Take the next one from the '
                             'aggregate''s row, under its lock, in the same transaction.';
        END IF;
        -- A transaction that this one does not see began the chain.
        RAISE EXCEPTION 'version 1 of % was taken twice at the same time', name
            USING ERRCODE = 'unique_violation',
                  HINT = 'Take the version from the aggregate''s row, under its lock, in the same transaction.';
    END IF;
    IF came = chain.version + 1 AND at_position <= chain.last_position THEN
        RAISE EXCEPTION 'version % of % has position %, which is not above %, the position of version %',
                        came, name, at_position, chain.last_position, chain.version
            USING ERRCODE = 'serialization_failure',
                  HINT = 'Another transaction wrote an event of the aggregate after this one had taken its position. Repeat '
                         'the transaction, and lock the aggregate''s row before the INSERT. If this fails every time, the '
                         'sequence outbox.position is behind: run outbox-relay recover --sequence.';
    ELSIF came = chain.version + 1 THEN
        -- Another transaction took the version before, after the statement had begun.
        RAISE EXCEPTION '% was changed by another transaction meanwhile', name
            USING ERRCODE = 'serialization_failure',
                  HINT = 'Repeat the transaction, and lock the aggregate''s row before the INSERT.';
    ELSIF came > chain.version THEN
        RAISE EXCEPTION 'the next version of % is %, and not %', name, chain.version + 1, came
            USING ERRCODE = 'integrity_constraint_violation',
                  HINT = 'Versions have no holes: subscribers would wait for the missing ones.';
    ELSE
        RAISE EXCEPTION 'the next version of % is %, and not %, which is taken', name, chain.version + 1, came
            USING ERRCODE = 'unique_violation',
                  HINT = 'Take the version from the aggregate''s row, under its lock. A key that is used again after its '
                         'aggregate was deleted goes on with the next version.';
    END IF;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.take_up_chain(text, text, bigint, uuid, bigint, text) FROM PUBLIC;

-- Each event continues its chain, and names the one before it. What NOT NULL and the checks of outbox.event refuse goes
-- through here: those have the better words. A writer has no right on outbox.aggregate, so this runs with its owner's. No
-- search_path is set, which would cost a tenth of the throughput: every name and operator is qualified.
--
-- A transaction that writes many events of one aggregate leaves as many dead versions of the chain's row, and the index
-- leads through all of them: 20,000 events took 15 s. So the last row's place (ctid) is kept in a setting of the
-- transaction, and tried first. All conditions hold there too, so a place that is out of date finds nothing.
CREATE FUNCTION outbox.continue_chain() RETURNS trigger
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    becomes pg_catalog.text := 'live';
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
    END IF;
    IF NEW.version OPERATOR(pg_catalog.=) 1 THEN
        INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
        VALUES (NEW.aggregate_type, NEW.aggregate_id, 1, NEW.id, NEW.position, becomes)
        ON CONFLICT DO NOTHING
        RETURNING aggregate.ctid INTO place;
        NEW.previous_id := '00000000-0000-0000-0000-000000000000';
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
            RETURNING a.previous_event_id, a.ctid INTO NEW.previous_id, place;
        END IF;
    END IF;
    IF place IS NULL THEN
        NEW.previous_id := outbox.take_up_chain(NEW.aggregate_type, NEW.aggregate_id, NEW.version, NEW.id, NEW.position,
                                                becomes);
    ELSE
        PERFORM pg_catalog.set_config(
            'outbox.chain', place::pg_catalog.text OPERATOR(pg_catalog.||) ' ' OPERATOR(pg_catalog.||) name, true);
    END IF;
    RETURN NEW;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.continue_chain() FROM PUBLIC;

-- Of those who may not set previous_id, which are all writers, each event goes through it. ALWAYS: also where a session says
-- that it only copies (session_replication_role).
CREATE TRIGGER continue_chain BEFORE INSERT ON outbox.event
    FOR EACH ROW WHEN (NEW.previous_id IS NULL) EXECUTE FUNCTION outbox.continue_chain();
ALTER TABLE outbox.event ENABLE ALWAYS TRIGGER continue_chain;

-- Says who counts the versions of an aggregate type from now on: 'outbox' (outbox.publish, outbox.capture) or 'writer' (an
-- INSERT with a version). Writers of the type that are under way finish first. Runs with its caller's rights, who has to
-- own the schema.
CREATE FUNCTION outbox.number_by(of_type text, counter text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF counter IS NULL OR counter NOT IN ('outbox', 'writer') THEN
        RAISE EXCEPTION 'the versions of a type are counted by ''outbox'' or by ''writer'', and not by %',
                        coalesce(quote_literal(counter), 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(1869968482, 1);
    INSERT INTO outbox.aggregate_type AS t (aggregate_type, numbered_by) VALUES (of_type, counter)
    ON CONFLICT (aggregate_type) DO UPDATE SET numbered_by = excluded.numbered_by;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.number_by(text, text) FROM PUBLIC;

-- The events as a reader may see them, as before, with the id of the event before each.
CREATE OR REPLACE VIEW outbox.readable WITH (security_invoker = true) AS
SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = e.aggregate_type AND r.aggregate_id = e.aggregate_id
                  AND e.version < r.below AND e.position <= r.up_to)
            THEN outbox.erased(e.payload, e.aggregate_id) ELSE e.payload END AS payload,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = e.aggregate_type AND r.aggregate_id = e.aggregate_id
                  AND e.version < r.below AND e.position <= r.up_to)
            THEN outbox.erased_headers(e.headers) ELSE e.headers END AS headers,
       e.created_at, e.previous_id
FROM outbox.event e;

-- The same of what is set aside.
CREATE OR REPLACE VIEW outbox.readable_parked WITH (security_invoker = true) AS
SELECT p.relay, p.position, p.id, p.aggregate_type, p.aggregate_id, p.version, p.type,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = p.aggregate_type AND r.aggregate_id = p.aggregate_id
                  AND p.version < r.below AND p.position <= r.up_to) AND p.payload IS NOT NULL
            THEN outbox.erased(p.payload, p.aggregate_id) ELSE p.payload END AS payload,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = p.aggregate_type AND r.aggregate_id = p.aggregate_id
                  AND p.version < r.below AND p.position <= r.up_to)
            THEN outbox.erased_headers(p.headers) ELSE p.headers END AS headers,
       p.created_at, p.previous_id
FROM outbox.parked p;

-- As before, the last version of each aggregate in the current incarnation, published or not: one pass over the chains,
-- whatever was retired.
CREATE OR REPLACE FUNCTION outbox.last_version() RETURNS TABLE (aggregate_type text, aggregate_id text, version bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT a.aggregate_type, a.aggregate_id, a.version FROM outbox.aggregate a
    WHERE a.version > 0 AND a.last_position > (SELECT s.from_position FROM outbox.source s)
$$;

-- As before, by one row of the chain for each aggregate.
CREATE OR REPLACE FUNCTION outbox.not_begun(types text[], ids text[]) RETURNS TABLE (aggregate_type text, aggregate_id text)
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT k.aggregate_type, k.aggregate_id
    FROM unnest(types, ids) AS k (aggregate_type, aggregate_id)
    WHERE NOT EXISTS (SELECT FROM outbox.aggregate a
                      WHERE a.aggregate_type = k.aggregate_type AND a.aggregate_id = k.aggregate_id
                        AND a.last_position > (SELECT s.from_position FROM outbox.source s))
$$;

-- As before, by one pass over the chains.
CREATE OR REPLACE FUNCTION outbox.without_baseline() RETURNS bigint
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*) FROM outbox.aggregate a
    WHERE (SELECT s.incarnation FROM outbox.source s) > 1
      AND a.last_position <= (SELECT s.from_position FROM outbox.source s) AND a.state <> 'ended'
$$;

-- Ends aggregates of the lost time, as before, above the end of their chain. It may skip versions, which subscribers have and
-- the outbox never had, so it continues the chains itself.
CREATE OR REPLACE FUNCTION outbox.end_lost(types text[], ids text[], versions bigint[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ended bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox.end_lost has to see what others commit while it waits: use READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(1869968482, 1);
    -- A statement of its own, so its snapshot has all that the writers have committed.
    WITH lost AS (
        INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, previous_id)
        SELECT k.aggregate_type, k.aggregate_id, greatest(k.version, a.version) + 1,
               k.aggregate_type || '.deleted', json_build_object('id', k.aggregate_id),
               '00000000-0000-0000-0000-000000000000'
        FROM unnest(types, ids, versions) AS k (aggregate_type, aggregate_id, version)
        JOIN outbox.not_begun(types, ids) USING (aggregate_type, aggregate_id)
        LEFT JOIN outbox.aggregate a USING (aggregate_type, aggregate_id)
        ORDER BY 1, 2
        RETURNING *
    )
    INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
    SELECT l.aggregate_type, l.aggregate_id, l.version, l.id, l.position, 'ended' FROM lost l
    ON CONFLICT ON CONSTRAINT aggregate_pkey DO UPDATE
    SET version = excluded.version, previous_event_id = a.last_event_id, last_event_id = excluded.last_event_id,
        last_position = excluded.last_position, state = 'ended', body_hash = NULL;
    GET DIAGNOSTICS ended = ROW_COUNT;
    RETURN ended;
END
$$;

-- Mends a sequence that is behind, as before, and the chains whose last event it moves.
CREATE OR REPLACE FUNCTION outbox.mend_sequence(since bigint, OUT stood_at bigint, OUT stands_at bigint, OUT moved bigint)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    used     bigint;
    old_ones bigint[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox.mend_sequence has to see what others commit while it waits: use READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(1869968482, 1);
    SELECT o.last_position, o.last_position, o.used_position, 0 INTO stood_at, stands_at, used, moved FROM outbox.overview o;
    IF stood_at >= used THEN
        RETURN;
    END IF;
    UPDATE outbox.relay SET epoch = epoch + 1;
    old_ones := ARRAY(SELECT r.at_position FROM outbox.reissued_event(since) r WHERE r.is_latest ORDER BY 1);
    moved := cardinality(old_ones);
    stands_at := used + moved;
    -- What is being erased stays so: up_to is the last position that an erasure is about.
    UPDATE outbox.erasure r SET up_to = greatest(r.up_to, stands_at)
    WHERE EXISTS (SELECT FROM outbox.event e
                  WHERE e.position = ANY (old_ones) AND e.aggregate_type = r.aggregate_type
                    AND e.aggregate_id = r.aggregate_id AND e.version < r.below);
    -- The events and the chains that end with them. Of each aggregate the last one that moves is its last one.
    WITH moving AS (
        UPDATE outbox.event e SET position = used + n.number
        FROM unnest(old_ones) WITH ORDINALITY AS n (at_position, number) WHERE e.position = n.at_position
        RETURNING e.aggregate_type, e.aggregate_id, e.id, e.position
    )
    UPDATE outbox.aggregate a SET last_position = m.position
    FROM moving m
    WHERE m.aggregate_type = a.aggregate_type AND m.aggregate_id = a.aggregate_id AND m.id = a.last_event_id;
    -- A relay that has read one of them all the same, as a late one, and set it aside, finds its copy.
    UPDATE outbox.parked p SET position = used + n.number
    FROM unnest(old_ones) WITH ORDINALITY AS n (at_position, number) WHERE p.position = n.at_position;
    EXECUTE format('ALTER SEQUENCE outbox.position RESTART WITH %s', stands_at);
    -- As after any other position: it is handed out.
    PERFORM nextval('outbox.position');
END
$$;

-- What a writer needs and no more: the rights of before, and to read what is no body and no header, so that
-- `INSERT ... RETURNING id, version`, as object-relational mappers write it, works. previous_id is set by the outbox alone.
CREATE OR REPLACE FUNCTION outbox.grant_writer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration TO %s', role);
    EXECUTE format('GRANT SELECT (position, id, aggregate_type, aggregate_id, version, type, created_at, previous_id),'
                   ' INSERT (id, aggregate_type, aggregate_id, version, type, payload, headers, created_at)'
                   ' ON outbox.event TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.erase(text[], text[], bigint[]) TO %s', role);
END
$$;
SELECT outbox.grant_writer(r.grantee::regrole)
FROM pg_attribute a, aclexplode(a.attacl) r
WHERE a.attrelid = 'outbox.event'::regclass AND a.attname = 'payload' AND r.privilege_type = 'INSERT'
  AND r.grantee <> (SELECT c.relowner FROM pg_class c WHERE c.oid = a.attrelid);

-- What an operator's role needs to look, as before, and the chains.
CREATE OR REPLACE FUNCTION outbox.grant_reader(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.position, outbox.erasure, outbox.partition,'
                   ' outbox.overview, outbox.relay_status, outbox.leader_session, outbox.lock_holder,'
                   ' outbox.event_progress, outbox.parked_event, outbox.parked_group, outbox.waiting_group,'
                   ' outbox.partition_status, outbox.aggregate, outbox.aggregate_type TO %s', role);
    EXECUTE format('GRANT SELECT (position, id, aggregate_type, aggregate_id, version, type, created_at, previous_id)'
                   ' ON outbox.event TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.leader_pid, outbox.retention_blocker TO %s', role);
END
$$;
SELECT outbox.grant_reader(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.relay_status'::regclass AND r.privilege_type = 'SELECT' AND r.grantee <> c.relowner AND r.grantee <> 0;
COMMENT ON TABLE outbox.aggregate IS
    'A row: an aggregate that has had events, with the last one: version, last_event_id, last_position, and whether the
aggregate lives (state). Only the outbox writes it.';
COMMENT ON TABLE outbox.aggregate_type IS
    'A row: an aggregate type, and who counts its versions (numbered_by): the outbox, or the writer.';

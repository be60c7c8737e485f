-- An event in one line: outbox.publish takes the next version itself, under the lock of the aggregate's chain. A service
-- needs no column for versions any more. outbox.lock takes that lock alone, for who reads a body after it.

-- The chain's row (outbox.aggregate) is the lock. To lock is to UPDATE the row, also if nothing is published afterwards:
-- a transaction in REPEATABLE READ then notices that another one was there since its snapshot, and fails with 40001. After a
-- lock without a write it would not, and its last body would be wrong for ever.
--
-- An aggregate without events can be locked too. Its row then has version 0, no event (the zero UUID), the position 0, and
-- is ended: nobody who asks for living aggregates, or for those of an incarnation, finds it, and its first event is 1.
--
-- A transaction that locks one aggregate many times leaves as many dead versions of the row: as in outbox.continue_chain
-- the last row's place is kept in the setting outbox.chain of the transaction.

-- What is wrong with a name that was given to a function of the outbox, if anything is.
CREATE FUNCTION outbox.check_name(of_function text, argument text, value text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF value IS NULL THEN
        RAISE EXCEPTION 'the argument % of % is null', argument, of_function
            USING ERRCODE = 'null_value_not_allowed', HINT = 'Give a text of 1 to 255 bytes.';
    ELSIF octet_length(value) NOT BETWEEN 1 AND 255 THEN
        RAISE EXCEPTION 'the argument % of % has % bytes', argument, of_function, octet_length(value)
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Give a text of 1 to 255 bytes.';
    END IF;
END
$$;

-- The next position, which has to lie above the one of the aggregate's last event. It does, except where the sequence is
-- behind.
CREATE FUNCTION outbox.next_position_above(last bigint) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    taken pg_catalog.int8 := outbox.next_position();
BEGIN
    IF taken OPERATOR(pg_catalog.<=) last THEN
        RAISE EXCEPTION 'the next position is %, and the last event of the aggregate has %', taken, last
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'The sequence outbox.position is behind: run outbox-relay recover --sequence.';
    END IF;
    RETURN taken;
END
$$;

-- Locks the chain of an aggregate until the end of the transaction. Returns the version of its last event; 0 without one.
-- Take the locks of your own rows first, and those of several chains in the order of type and id: another order deadlocks.
-- Read what goes into the body in a statement after this one.
CREATE FUNCTION outbox.lock(aggregate_type text, aggregate_id text) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
#variable_conflict use_column
DECLARE
    of_type constant pg_catalog.text := lock.aggregate_type;
    of_id   constant pg_catalog.text := lock.aggregate_id;
    name    constant pg_catalog.text := of_type OPERATOR(pg_catalog.||) '/' OPERATOR(pg_catalog.||) of_id;
    last    pg_catalog.text;
    place   pg_catalog.tid;
    locked  pg_catalog.int8;
BEGIN
    IF (of_type OPERATOR(pg_catalog.<>) '' AND of_id OPERATOR(pg_catalog.<>) ''
        AND pg_catalog.octet_length(of_type) OPERATOR(pg_catalog.<=) 255
        AND pg_catalog.octet_length(of_id) OPERATOR(pg_catalog.<=) 255) IS NOT TRUE THEN
        PERFORM outbox.check_name('outbox.lock', 'aggregate_type', of_type),
                outbox.check_name('outbox.lock', 'aggregate_id', of_id);
    END IF;
    last := pg_catalog.current_setting('outbox.chain', true);
    -- `(page,line) TYPE/ID`, as outbox.continue_chain writes it: the place has no space.
    IF pg_catalog.substr(last, pg_catalog.strpos(last, ' ') OPERATOR(pg_catalog.+) 1) OPERATOR(pg_catalog.=) name THEN
        UPDATE outbox.aggregate a SET version = a.version
        WHERE a.ctid OPERATOR(pg_catalog.=) pg_catalog.split_part(last, ' ', 1)::pg_catalog.tid
          AND a.aggregate_type OPERATOR(pg_catalog.=) of_type AND a.aggregate_id OPERATOR(pg_catalog.=) of_id
        RETURNING a.version, a.ctid INTO locked, place;
    END IF;
    WHILE place IS NULL LOOP
        UPDATE outbox.aggregate a SET version = a.version
        WHERE a.aggregate_type OPERATOR(pg_catalog.=) of_type AND a.aggregate_id OPERATOR(pg_catalog.=) of_id
        RETURNING a.version, a.ctid INTO locked, place;
        EXIT WHEN place IS NOT NULL;
        -- Another transaction may insert it meanwhile: then this waits for its end, and the row is there.
        INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
        VALUES (of_type, of_id, 0, '00000000-0000-0000-0000-000000000000', 0, 'ended')
        ON CONFLICT DO NOTHING
        RETURNING a.version, a.ctid INTO locked, place;
    END LOOP;
    PERFORM pg_catalog.set_config(
        'outbox.chain', place::pg_catalog.text OPERATOR(pg_catalog.||) ' ' OPERATOR(pg_catalog.||) name, true);
    RETURN locked;
END
$$;

-- For who inserts events with versions: the next version of an aggregate, whose chain it locks. Call it in a statement before
-- the INSERT: within it, the default of position comes first, and a writer that had to wait for the lock fails with 40001.
CREATE FUNCTION outbox.next_version(aggregate_type text, aggregate_id text) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    locked bigint := outbox.lock(next_version.aggregate_type, next_version.aggregate_id);
BEGIN
    -- An outbox that retired history before it kept chains cannot tell a new aggregate from one whose events are gone.
    IF locked = 0 AND (SELECT s.adopts_chains FROM outbox.source s) THEN
        RAISE EXCEPTION 'the outbox does not know whether %/% had events', next_version.aggregate_type,
                        next_version.aggregate_id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Its history had been retired before it counted versions. Insert the event with the version that '
                         'your own row says, which the outbox then goes on from.';
    END IF;
    RETURN locked + 1;
END
$$;

-- A type that is not known to be counted by the outbox, and is to be published: it is from now on, or this says why not.
CREATE FUNCTION outbox.begin_type(of_type text, counter text) RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF counter = 'writer' THEN
        RAISE EXCEPTION 'the writers of the type % count its versions themselves, and outbox.publish takes the next one',
                        of_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Insert the event with its version. To let the outbox count, the owner of the outbox calls '
                                'outbox.number_by(%L, ''outbox'').', of_type);
    ELSIF (SELECT s.adopts_chains FROM outbox.source s) THEN
        -- The type may have had events that are retired: 1 would be the wrong version for some of its aggregates.
        RAISE EXCEPTION 'the outbox does not know whether the type % had events', of_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Its history had been retired before it counted versions. The owner of the outbox says once '
                                'that it counts them, by outbox.number_by(%L, ''outbox''); with a third argument if there '
                                'were events, a query for the id and the version of each aggregate.', of_type);
    END IF;
    PERFORM outbox.note_type(of_type, 'outbox');
END
$$;

-- The part of outbox.publish that needs rights on the chain: takes the next version under the chain's lock, then the
-- position, and inserts the event.
--
-- The position is in the SET list of the UPDATE that locks: when that has waited for another transaction it is computed
-- anew, from the row as that left it, so it is always taken after the lock. The trigger continue_chain has nothing to do:
-- previous_id is set.
CREATE FUNCTION outbox.publish_next(of_type text, of_id text, event_type text, event_id uuid, event_payload json,
                                    event_headers jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
DECLARE
    name     constant pg_catalog.text := of_type OPERATOR(pg_catalog.||) '/' OPERATOR(pg_catalog.||) of_id;
    last     constant pg_catalog.text := pg_catalog.current_setting('outbox.chain', true);
    becomes  pg_catalog.text := 'live';
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
        RETURNING a.version, a.previous_event_id, a.last_position, a.ctid INTO taken, previous, position, place;
    END IF;
    WHILE place IS NULL LOOP
        UPDATE outbox.aggregate a
        SET version = a.version OPERATOR(pg_catalog.+) 1, previous_event_id = a.last_event_id, last_event_id = event_id,
            last_position = outbox.next_position_above(a.last_position), state = becomes, body_hash = NULL
        WHERE a.aggregate_type OPERATOR(pg_catalog.=) of_type AND a.aggregate_id OPERATOR(pg_catalog.=) of_id
        RETURNING a.version, a.previous_event_id, a.last_position, a.ctid INTO taken, previous, position, place;
        EXIT WHEN place IS NOT NULL;
        -- The first event of the aggregate, unless another transaction writes it meanwhile: then this waits for its end.
        INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
        VALUES (of_type, of_id, 1, event_id, outbox.next_position_above(0), becomes)
        ON CONFLICT DO NOTHING
        RETURNING a.version, a.previous_event_id, a.last_position, a.ctid INTO taken, previous, position, place;
    END LOOP;
    PERFORM pg_catalog.set_config(
        'outbox.chain', place::pg_catalog.text OPERATOR(pg_catalog.||) ' ' OPERATOR(pg_catalog.||) name, true);
    INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
    VALUES (position, event_id, of_type, of_id, taken, event_type, event_payload, event_headers, previous);
    RETURN taken;
END
$$;

-- What the function `body` says about an aggregate, with the rights of the caller. The function takes the aggregate's id, in
-- whatever type it has there, and returns json or jsonb.
CREATE FUNCTION outbox.read_body(body text, aggregate_type text, aggregate_id text) RETURNS json
    LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    called  pg_catalog.regprocedure;
    wanted  pg_catalog.pg_proc;
    payload pg_catalog.json;
BEGIN
    called := CASE WHEN body OPERATOR(pg_catalog.~) '^[^()]+$'
                   THEN pg_catalog.to_regproc(body)::pg_catalog.oid::pg_catalog.regprocedure
                   WHEN body OPERATOR(pg_catalog.~) '^[^()]+\([^()]+\)$' THEN pg_catalog.to_regprocedure(body) END;
    IF called IS NULL THEN
        RAISE EXCEPTION 'the argument body of outbox.publish names no function, or several: %', body
            USING ERRCODE = 'undefined_function',
                  HINT = 'Give the name of a function with its schema, as ''shop.order_body''; of several with one name, also '
                         'the type of the argument, as ''shop.order_body(bigint)''.';
    END IF;
    SELECT p.* INTO wanted FROM pg_catalog.pg_proc p WHERE p.oid OPERATOR(pg_catalog.=) called::pg_catalog.oid;
    IF (wanted.prokind OPERATOR(pg_catalog.=) 'f' AND NOT wanted.proretset
        AND wanted.pronargs OPERATOR(pg_catalog.=) 1 AND wanted.provariadic OPERATOR(pg_catalog.=) 0
        AND wanted.prorettype OPERATOR(pg_catalog.=) ANY
            (ARRAY['pg_catalog.json'::pg_catalog.regtype, 'pg_catalog.jsonb'::pg_catalog.regtype]::pg_catalog.oid[]))
       IS NOT TRUE THEN
        RAISE EXCEPTION 'the argument body of outbox.publish names %, which does not take one argument and return one json or jsonb',
                        called
            USING ERRCODE = 'invalid_function_definition',
                  HINT = 'The function takes the id of the aggregate and returns its body.';
    END IF;
    EXECUTE pg_catalog.format('SELECT %s($1::%s)::pg_catalog.json', called::pg_catalog.oid::pg_catalog.regproc,
                              pg_catalog.format_type(wanted.proargtypes[0], NULL))
        INTO payload USING aggregate_id;
    IF payload IS NULL THEN
        RAISE EXCEPTION 'the function % returned null for %/%', called, aggregate_type, aggregate_id
            USING ERRCODE = 'null_value_not_allowed',
                  HINT = pg_catalog.format('It has to return the body of the aggregate. If the aggregate was deleted, publish '
                                           '%s.deleted with a payload.', aggregate_type);
    END IF;
    RETURN payload;
END
$$;

-- Publishes an event: locks the chain of its aggregate, takes the next version and returns it.
--   payload  the body, which was read before the lock. Read what other transactions may change after it: call
--            outbox.lock in a statement before, or give
--   body     instead: the name of a function that takes the aggregate's id and returns the body. It is called after the
--            lock, with the rights of the caller.
--   headers  a JSON object of further AMQP headers.
--   id       the event's id, a UUIDv7; by default a new one.
-- No search_path is set: the body function has the caller's.
CREATE FUNCTION outbox.publish(type text, aggregate_type text, aggregate_id text, payload json DEFAULT NULL,
                               headers jsonb DEFAULT NULL, id uuid DEFAULT NULL, body text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF body IS NOT NULL THEN
        IF payload IS NOT NULL THEN
            RAISE EXCEPTION 'the arguments payload and body of outbox.publish are both given'
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'Give the body itself, or the function that returns it.';
        END IF;
        PERFORM outbox.lock(aggregate_type, aggregate_id);
        payload := outbox.read_body(body, aggregate_type, aggregate_id);
    ELSIF payload IS NULL THEN
        RAISE EXCEPTION 'the arguments payload and body of outbox.publish are both null'
            USING ERRCODE = 'null_value_not_allowed',
                  HINT = 'Give the body of the event as JSON in payload, or in body the name of a function that returns it.';
    END IF;
    RETURN outbox.publish_next(aggregate_type, aggregate_id, type, coalesce(id, outbox.uuid7()), payload, headers);
END
$$;

REVOKE EXECUTE ON FUNCTION
    outbox.check_name(text, text, text), outbox.next_position_above(bigint), outbox.lock(text, text),
    outbox.next_version(text, text), outbox.begin_type(text, text), outbox.publish_next(text, text, text, uuid, json, jsonb),
    outbox.read_body(text, text, text), outbox.publish(text, text, text, json, jsonb, uuid, text)
FROM PUBLIC;

-- As before, and an INSERT also begins the chain of an aggregate that was locked before it had an event.
CREATE OR REPLACE FUNCTION outbox.take_up_chain(of_type text, of_id text, came bigint, event_id uuid, at_position bigint,
                                                becomes text) RETURNS uuid
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    zero  constant uuid := '00000000-0000-0000-0000-000000000000';
    chain outbox.aggregate;
    name  text := of_type || '/' || of_id;
BEGIN
    SELECT * INTO chain FROM outbox.aggregate a
    WHERE a.aggregate_type = of_type AND a.aggregate_id = of_id;
    IF chain.version = 0 AND (came = 1 OR (SELECT s.adopts_chains FROM outbox.source s)) THEN
        -- It was locked before it had an event.
        UPDATE outbox.aggregate a
        SET version = came, last_event_id = event_id, last_position = at_position, state = becomes
        WHERE a.aggregate_type = of_type AND a.aggregate_id = of_id AND a.version = 0;
        IF FOUND THEN
            RETURN zero;
        END IF;
    END IF;
    IF chain.version IS NULL OR chain.version = 0 THEN
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

-- Says who counts the versions of an aggregate type from now on, as before. With `versions` also from where: a query, run
-- with the caller's rights, for the columns id and version, the last one, of each aggregate of the type; a third column,
-- ended, may say whether the aggregate has ended. The outbox takes over the chains that it does not have, or has at a lower
-- version. In a later incarnation than the first they have not begun yet: they wait for a baseline.
-- It has to be given where history had been retired before the outbox kept chains, so that the outbox counts on where the
-- writers stopped.
DROP FUNCTION outbox.number_by(text, text);
CREATE FUNCTION outbox.number_by(of_type text, counter text, versions text DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    counted_by text;
BEGIN
    PERFORM outbox.check_name('outbox.number_by', 'of_type', of_type);
    IF counter IS NULL OR counter NOT IN ('outbox', 'writer') THEN
        RAISE EXCEPTION 'the versions of a type are counted by ''outbox'' or by ''writer'', and not by %',
                        coalesce(quote_literal(counter), 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox.number_by has to see what others commit while it waits: use READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(1869968482, 1);
    SELECT t.numbered_by INTO counted_by FROM outbox.aggregate_type t WHERE t.aggregate_type = of_type;
    IF counter = 'outbox' AND counted_by = 'writer' AND versions IS NULL
       AND (SELECT s.adopts_chains FROM outbox.source s) THEN
        RAISE EXCEPTION 'the outbox does not know the versions of all aggregates of the type %', of_type
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Its history had been retired before it counted versions. Tell it by a query: SELECT '
                                'outbox.number_by(%L, ''outbox'', ''SELECT id, version FROM ...'').', of_type);
    END IF;
    IF versions IS NOT NULL THEN
        EXECUTE format(
            'INSERT INTO outbox.aggregate AS a (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
             SELECT $1, v.id::text, v.version, ''00000000-0000-0000-0000-000000000000'',
                    (SELECT CASE WHEN s.incarnation = 1 AND p.is_called THEN p.last_value ELSE 0 END
                     FROM outbox.source s, outbox.position p),
                    CASE to_jsonb(v) ->> ''ended'' WHEN ''true'' THEN ''ended'' WHEN ''false'' THEN ''live'' ELSE ''unknown'' END
             FROM (%s) AS v
             WHERE v.version > 0 AND NOT EXISTS (
                 SELECT FROM outbox.aggregate a
                 WHERE a.aggregate_type = $1 AND a.aggregate_id = v.id::text AND a.version >= v.version)
             ON CONFLICT ON CONSTRAINT aggregate_pkey DO UPDATE
             SET version = excluded.version, previous_event_id = a.last_event_id, last_event_id = excluded.last_event_id,
                 state = CASE a.version WHEN 0 THEN excluded.state ELSE a.state END', versions) USING of_type;
    END IF;
    INSERT INTO outbox.aggregate_type AS t (aggregate_type, numbered_by) VALUES (of_type, counter)
    ON CONFLICT ON CONSTRAINT aggregate_type_pkey DO UPDATE SET numbered_by = excluded.numbered_by;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.number_by(text, text, text) FROM PUBLIC;

-- What a writer needs and no more: the rights of before, to publish and to lock, and to read where chains stand.
CREATE OR REPLACE FUNCTION outbox.grant_writer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.aggregate_type TO %s', role);
    EXECUTE format('GRANT SELECT (position, id, aggregate_type, aggregate_id, version, type, created_at, previous_id),'
                   ' INSERT (id, aggregate_type, aggregate_id, version, type, payload, headers, created_at)'
                   ' ON outbox.event TO %s', role);
    EXECUTE format('GRANT SELECT (aggregate_type, aggregate_id, version, last_event_id, last_position, state)'
                   ' ON outbox.aggregate TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.erase(text[], text[], bigint[]), outbox.lock(text, text),'
                   ' outbox.next_version(text, text), outbox.read_body(text, text, text),'
                   ' outbox.publish_next(text, text, text, uuid, json, jsonb),'
                   ' outbox.publish(text, text, text, json, jsonb, uuid, text) TO %s', role);
END
$$;
SELECT outbox.grant_writer(r.grantee::regrole)
FROM pg_attribute a, aclexplode(a.attacl) r
WHERE a.attrelid = 'outbox.event'::regclass AND a.attname = 'payload' AND r.privilege_type = 'INSERT'
  AND r.grantee <> (SELECT c.relowner FROM pg_class c WHERE c.oid = a.attrelid);
COMMENT ON COLUMN outbox.aggregate.version IS
    'That of the last event. 0 if the aggregate was locked and never had one.';
COMMENT ON FUNCTION outbox.publish(text, text, text, json, jsonb, uuid, text) IS
    'Publishes an event with the next version of its aggregate, and returns the version. Give the body as payload, or in
body the name of a function that reads it under the lock.';
COMMENT ON FUNCTION outbox.lock(text, text) IS
    'Locks an aggregate until the end of the transaction, and returns the version of its last event; 0 without one.';
COMMENT ON FUNCTION outbox.next_version(text, text) IS
    'Locks an aggregate, and returns the version that its next event has to have. For events that are inserted.';
COMMENT ON FUNCTION outbox.number_by(text, text, text) IS
    'Says who counts the versions of an aggregate type: outbox, or writer. versions: a query for id and version of each.';

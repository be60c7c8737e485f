-- Reads a person with their items as one snapshot, as JSON in the shape of a baseline.
--
-- Parameters: 1 cpf, 2 the number of items of each kind. One more is read, to know whether there are more. `OFFSET 0`
-- keeps PostgreSQL from reading the items again for each use.
SELECT person.id, person.version,
       (SELECT row_to_json(body)::text
        FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                     person.created_at, person.status, person.version,
                     incomes.items[:$2] AS incomes, assets.items[:$2] AS assets, debts.items[:$2] AS debts,
                     array_remove(ARRAY[
                         CASE WHEN cardinality(incomes.items) > $2 THEN 'incomes' END,
                         CASE WHEN cardinality(assets.items) > $2 THEN 'assets' END,
                         CASE WHEN cardinality(debts.items) > $2 THEN 'debts' END], NULL) AS truncated
             ) body) AS body
FROM person.person,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id, type, trim_scale(value) AS value, created_at
               FROM person.income WHERE person_id = person.id ORDER BY id LIMIT $2 + 1) item) AS items OFFSET 0) incomes,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id, type, trim_scale(value) AS value, created_at
               FROM person.asset WHERE person_id = person.id ORDER BY id LIMIT $2 + 1) item) AS items OFFSET 0) assets,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id, trim_scale(value) AS value, created_at
               FROM person.debt WHERE person_id = person.id ORDER BY id LIMIT $2 + 1) item) AS items OFFSET 0) debts
WHERE person.cpf = $1

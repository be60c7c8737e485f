// node check.js DOCUMENT GOLDEN-FOLDER: prints what is wrong, a line each, and then what was looked at.
'use strict'
const fs = require('fs')
const path = require('path')
const { Parser } = require('@asyncapi/parser')
const Ajv = require('ajv')
const formats = require('ajv-formats')

const [document, golden] = process.argv.slice(2)
const wrong = []

// The schemas that apply to a value; of several alternatives, all.
function schemas (schema) {
  return [schema, ...['anyOf', 'oneOf', 'allOf'].flatMap(of => (schema[of] || []).flatMap(schemas))]
}

// Fields that the document does not name: it would be behind the code.
function unnamed (schema, value, where) {
  const all = schemas(schema)
  if (Array.isArray(value)) {
    for (const inner of value) unnamed(all.find(one => one.items).items, inner, where)
  } else if (value !== null && typeof value === 'object') {
    for (const [name, inner] of Object.entries(value)) {
      const named = all.map(one => one.properties && one.properties[name]).find(Boolean)
      if (named) unnamed(named, inner, `${where}.${name}`)
      else wrong.push(`${where}.${name} is not in the document`)
    }
  }
}

async function main () {
  const text = fs.readFileSync(document, 'utf8')
  const { document: parsed, diagnostics } = await new Parser().parse(text)
  for (const said of diagnostics) {
    // 0 is an error, 1 a warning. That a newer version of the specification exists is neither.
    if (said.severity <= 1) wrong.push(`${said.path.join('.')}: ${said.message}`)
  }
  if (!parsed) return console.log(wrong.join('\n'))
  const ajv = new Ajv({ strict: false, allErrors: true })
  formats(ajv)
  const messages = new Map(parsed.components().messages().all().map(message => [message.name(), message]))
  const channels = parsed.channels().all()
  for (const channel of channels) {
    const names = channel.messages().all().map(message => message.name()).sort()
    if (names.join() !== [...messages.keys()].sort().join()) wrong.push(`${channel.id()} lacks messages`)
  }
  const seen = new Set()
  const bodies = fs.readdirSync(golden).sort()
  for (const file of bodies) {
    const body = JSON.parse(fs.readFileSync(path.join(golden, file), 'utf8'))
    const type = path.basename(file, '.json').split('-')[0]
    // Any type may be erased.
    const message = messages.get(type === 'person.erased' ? 'person.changed' : type)
    if (!message) {
      wrong.push(`${file}: no message ${type}`)
      continue
    }
    seen.add(message.name())
    const schema = message.payload().json()
    const validate = ajv.compile(schema)
    if (!validate(body)) wrong.push(`${file}: ${ajv.errorsText(validate.errors)}`)
    unnamed(schema, body, file)
    // A field that each body of a type has is required, but for the mark of an erasure.
    for (const name of Object.keys(body)) {
      const { [name]: _, ...less } = body
      if (validate(less) && !['erased', 'status'].includes(name)) wrong.push(`${file}: ${name} is not required`)
    }
  }
  for (const name of messages.keys()) if (!seen.has(name)) wrong.push(`${name} has no golden body`)
  wrong.sort()
  console.log(wrong.join('\n') + `\n${messages.size} messages, ${channels.length} channels, ${bodies.length} golden bodies`)
}
main()

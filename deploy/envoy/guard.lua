-- Checks each ModelInfer request. Callers may use only the ensembles, and only without tensor parameters:
-- * The models inside the ensembles are not for callers.
-- * Output parameters turn on Triton's classification and shared-memory extensions. The first, on a string tensor such
--   as `category`, makes Triton divide by zero and crash.
-- * If the length of a string is past the end of its tensor, Triton's Python backend fails the whole batch, with the
--   requests of other callers.
-- This code parses only the necessary part of protobuf's encoding, and refuses what it cannot parse.

local INFER = "/inference.GRPCInferenceService/ModelInfer"
local MODELS = { product_classifier = true, product_decisions = true, product_attributes = true }
-- Field numbers of ModelInferRequest, of its inputs and of its outputs.
local MODEL_NAME, INPUTS, OUTPUTS, RAW = 1, 5, 6, 7
local DATATYPE, INPUT_PARAMETERS, OUTPUT_PARAMETERS = 2, 4, 2
local HEADER = 5 -- bytes before a gRPC message: a compression flag and the length

-- Return the varint at position i, and the position after it; nil if there is none.
local function varint(bytes, i)
  local value, scale = 0, 1
  for _ = 1, 10 do
    local byte = bytes:byte(i)
    if not byte then return nil end
    value, scale, i = value + byte % 128 * scale, scale * 128, i + 1
    if byte < 128 then return value, i end
  end
end

-- Call visit(field, first, last) for each length-delimited field; raise an error if the bytes are malformed.
local function each(bytes, i, last, visit)
  while i <= last do
    local key, first = varint(bytes, i)
    assert(key and key < 2 ^ 32)
    local wire, size = key % 8, nil
    if wire == 0 then
      size, i = 0, select(2, varint(bytes, first))
      assert(i)
    elseif wire == 1 then
      i = first + 8
    elseif wire == 5 then
      i = first + 4
    else
      assert(wire == 2)
      size, first = varint(bytes, first)
      assert(size)
      i = first + size
    end
    assert(i <= last + 1)
    if wire == 2 then visit(math.floor(key / 8), first, i - 1) end
  end
end

-- Return whether the bytes from first to last are complete strings, each after its four-byte length.
local function complete(bytes, first, last)
  while first + 3 <= last do
    local a, b, c, d = bytes:byte(first, first + 3)
    first = first + 4 + a + b * 2 ^ 8 + c * 2 ^ 16 + d * 2 ^ 24
  end
  return first == last + 1
end

local function check(bytes)
  local size = 0
  for i = 2, HEADER do size = size * 256 + bytes:byte(i) end
  assert(bytes:byte(1) == 0 and HEADER + size == #bytes) -- one message, not compressed
  local model, plain, types, raws = nil, true, {}, {}
  each(bytes, HEADER + 1, #bytes, function(field, first, last)
    if field == MODEL_NAME then
      model = bytes:sub(first, last)
    elseif field == INPUTS then
      local datatype = ""
      each(bytes, first, last, function(inner, from, to)
        if inner == DATATYPE then datatype = bytes:sub(from, to) end
        plain = plain and inner ~= INPUT_PARAMETERS
      end)
      types[#types + 1] = datatype
    elseif field == OUTPUTS then
      each(bytes, first, last, function(inner) plain = plain and inner ~= OUTPUT_PARAMETERS end)
    elseif field == RAW then
      raws[#raws + 1] = { first, last }
    end
  end)
  for i, raw in ipairs(raws) do
    if types[i] == "BYTES" and not complete(bytes, raw[1], raw[2]) then return false end
  end
  return MODELS[model] and plain
end

function envoy_on_request(handle)
  if handle:headers():get(":path") ~= INFER then return end
  local body = handle:body()
  local read, allowed = pcall(function() return check(body:getBytes(0, body:length())) end)
  if not (read and allowed) then
    handle:respond({
      [":status"] = "200",
      ["content-type"] = "application/grpc",
      ["grpc-status"] = "3", -- INVALID_ARGUMENT
      ["grpc-message"] = "call product_classifier, product_decisions or product_attributes, uncompressed, with complete strings and without tensor parameters",
    }, "")
  end
end
